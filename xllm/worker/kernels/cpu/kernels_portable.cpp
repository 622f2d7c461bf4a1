// The kernels in plain C++. All headers with code of their own stand before the target.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace xk::portable {
namespace {
#include "vector_portable.h"
#include "vector_math.h"
#include "attention_tile.h"
#include "rows_body.h"
}  // namespace

extern const Kernels kernels = {
    {{attend_partition<Bf16>, attend_partition<float>,
      attend_partition<int8_t>}, merge_partial, finish_query},
    {rms_norm, split_row, write_row, arg_max},
};

}  // namespace xk::portable
