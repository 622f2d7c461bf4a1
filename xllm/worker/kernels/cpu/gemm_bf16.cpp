// AVX-512 BF16: x is rounded to bfloat16 and multiplied in pairs, sums in fp32.
#include "gemm_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#include "gemm_loops.h"

namespace xk {
namespace {

struct Bf16Pairs {
  using Part = __m512;
  static constexpr int kParts = 1, kRows1 = 14, kRows2 = 14, kRows4 = 6;
  static constexpr int kUnits = 1, kHeldBlocks = 0;
  static XK_INLINE Part zero() { return _mm512_setzero_ps(); }
  static XK_INLINE Part load(const float* from) { return _mm512_loadu_ps(from); }
  static XK_INLINE void store(float* to, Part part) { _mm512_storeu_ps(to, part); }
  static XK_INLINE Part weight(const char* w, int, int) { return _mm512_load_ps(w); }
  static XK_INLINE Part spread(const uint32_t* x) {
    return _mm512_set1_ps(*reinterpret_cast<const float*>(x));
  }
  static XK_INLINE void mac(Part& acc, Part w, Part x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
};

}  // namespace

void gemm_bf16(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
               int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  if (weight.kind == kBf16)
    product<Bf16Pairs, Bf16Pairs, Bf16Lines>(
        {team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch});
  else
    gemm_avx512(team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch);
}

}  // namespace xk
#endif
