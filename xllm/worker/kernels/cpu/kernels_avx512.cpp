// The kernels in AVX-512. All headers with code of their own stand before the target.
#if defined(__x86_64__)
// GCC's own headers trip these.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

namespace xk::avx512 {
namespace {
#include "vector_avx512.h"
#include "vector_math.h"
#include "attention_tile.h"
#include "rows_body.h"
}  // namespace

extern const Kernels kernels = {
    {{attend_partition<Bf16>, attend_partition<float>,
      attend_partition<int8_t>}, merge_partial, finish_query},
    {rms_norm, split_row, write_row, arg_max},
};

}  // namespace xk::avx512
#endif
