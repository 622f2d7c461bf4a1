// AVX-512F: bfloat16 weights are expanded to fp32 (a shift, a mask), then fused multiply-add.
#include "gemm_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#include "gemm_loops.h"

namespace xk {
namespace {

typedef uint32_t Words __attribute__((vector_size(64), may_alias));

struct Lanes {
  using Part = __m512;
  static constexpr int kParts = 1, kRows1 = 0, kRows2 = 14, kRows4 = 6;
  static XK_INLINE Part zero() { return _mm512_setzero_ps(); }
  static XK_INLINE Part load(const float* from) { return _mm512_loadu_ps(from); }
  static XK_INLINE void store(float* to, Part part) { _mm512_storeu_ps(to, part); }
  static XK_INLINE Part spread(const uint32_t* x) {
    return _mm512_set1_ps(*reinterpret_cast<const float*>(x));
  }
  static XK_INLINE Part mac(Part acc, Part w, Part x) { return _mm512_fmadd_ps(w, x, acc); }
};

struct Fp32 : Lanes {
  static constexpr int kUnits = 1;
  static XK_INLINE Part weight(const char* w, int, int) { return _mm512_load_ps(w); }
};

struct Bf16 : Lanes {
  static constexpr int kUnits = 2;
  static XK_INLINE Part weight(const char* w, int unit, int) {
    const Words pairs = *reinterpret_cast<const Words*>(w);
    return reinterpret_cast<Part>(unit == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  static void widen(const char* from, int steps, char* to) {
    for (int s = 0; s < steps; ++s, from += kStepBytes, to += 2 * kStepBytes) {
      _mm512_store_ps(to, weight(from, 0, 0));
      _mm512_store_ps(to + kStepBytes, weight(from, 1, 0));
    }
  }
};

}  // namespace

void gemm_avx512(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                 int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const Call call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kFp32)
    product<Fp32, Fp32, FloatLines>(call);
  else
    product<Bf16, Fp32, FloatLines>(call);
}

}  // namespace xk
#endif
