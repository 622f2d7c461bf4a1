// AVX2 and FMA: as AVX-512F, in halves of a block.
#include "gemm_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx2,fma")

#include "gemm_loops.h"

namespace xk {
namespace {

typedef uint32_t Words __attribute__((vector_size(32), may_alias));

struct Lanes {
  using Part = __m256;
  static constexpr int kParts = 2, kRows1 = 6, kRows2 = 3, kRows4 = 1;
  static constexpr int kHeldBlocks = 0;
  static XK_INLINE Part zero() { return _mm256_setzero_ps(); }
  static XK_INLINE Part load(const float* from) { return _mm256_loadu_ps(from); }
  static XK_INLINE void store(float* to, Part part) { _mm256_storeu_ps(to, part); }
  static XK_INLINE Part spread(const uint32_t* x) {
    return _mm256_broadcast_ss(reinterpret_cast<const float*>(x));
  }
  static XK_INLINE void mac(Part& acc, Part w, Part x) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
  }
};

struct Fp32 : Lanes {
  static constexpr int kUnits = 1;
  static XK_INLINE Part weight(const char* w, int, int part) {
    return _mm256_load_ps(reinterpret_cast<const float*>(w) + part * 8);
  }
};

struct Bf16 : Lanes {
  static constexpr int kUnits = 2;
  static XK_INLINE Part weight(const char* w, int unit, int part) {
    const Words pairs = *reinterpret_cast<const Words*>(w + part * 32);
    return reinterpret_cast<Part>(unit == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  static void widen(const char* from, int steps, char* to) {
    for (int s = 0; s < steps; ++s, from += kStepBytes)
      for (int unit = 0; unit < kUnits; ++unit, to += kStepBytes)
        for (int part = 0; part < kParts; ++part)
          store(reinterpret_cast<float*>(to) + part * 8, weight(from, unit, part));
  }
};

}  // namespace

void gemm_avx2(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
               int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const Call call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kFp32)
    product<Fp32, Fp32, FloatLines>(call);
  else
    product<Bf16, Fp32, FloatLines>(call);
}

}  // namespace xk
#endif
