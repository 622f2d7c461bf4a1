// AVX2: bytes as words of 16 bits (the even ones, the odd ones), multiplied and added in pairs.
#include "gemm_int_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx2,fma")

#include "gemm_int_loops.h"

namespace xk {
namespace {

struct Pairs {
  struct Sum {
    __m256i at[2];
  };
  struct Part {
    __m256i even[2], odd[2];
  };
  struct Inputs {
    __m256i even, odd;
  };
  static constexpr int kPlanes = 2, kRows1 = 3, kRows2 = 1, kRows4 = 0;

  static XK_INLINE void start(Sum& sum, int32_t init) {
    sum.at[0] = sum.at[1] = _mm256_set1_epi32(init);
  }
  template <class W>
  static XK_INLINE Part part(const char* from, int unit) {
    const __m256i mask = _mm256_set1_epi16(W::kUnits == 1 ? 255 : 15);
    Part part;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + h);
      if constexpr (W::kUnits == 1) {
        part.even[h] = _mm256_and_si256(bytes, mask);
        part.odd[h] = _mm256_srli_epi16(bytes, 8);
      } else {
        const __m256i even = unit == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
        const __m256i odd = _mm256_srli_epi16(bytes, unit == 0 ? 8 : 12);
        part.even[h] = _mm256_and_si256(even, mask);
        part.odd[h] = unit == 0 ? _mm256_and_si256(odd, mask) : odd;
      }
    }
    return part;
  }
  static XK_INLINE Inputs spread(const uint32_t* x) {
    return {_mm256_set1_epi32(static_cast<int32_t>(x[0])),
            _mm256_set1_epi32(static_cast<int32_t>(x[kIntUnits]))};
  }
  static XK_INLINE void mac(Sum& sum, const Part& part, const Inputs& x) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i even = _mm256_madd_epi16(part.even[h], x.even);
      const __m256i odd = _mm256_madd_epi16(part.odd[h], x.odd);
      sum.at[h] = _mm256_add_epi32(sum.at[h], _mm256_add_epi32(even, odd));
    }
  }
  static XK_INLINE void finish(const Sum& sum, float scale, const uint16_t* scales, bool first,
                               float* c) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum.at[h]), _mm256_set1_ps(scale));
      if (scales != nullptr) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales) + h);
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
        value = _mm256_mul_ps(value, _mm256_castsi256_ps(wide));
      }
      if (!first) value = _mm256_add_ps(_mm256_loadu_ps(c + 8 * h), value);
      _mm256_storeu_ps(c + 8 * h, value);
    }
  }
};

}  // namespace

void gemm_int_avx2(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                   int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const IntCall call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kW8A8)
    int_product<Pairs, Bytes, EvenOdd<kMost8>>(call);
  else if (weight.kind == kInt4)
    int_product<Pairs, Halves, EvenOdd<kMost16>>(call);
  else
    int_product<Pairs, Bytes, EvenOdd<kMost16>>(call);
}

}  // namespace xk
#endif
