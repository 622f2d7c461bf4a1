// SSE2, which every x86-64 has: as AVX2, in quarters of a block.
#include "gemm_int_variants.h"

#if defined(__x86_64__)
#include <emmintrin.h>

#include <type_traits>
#include <utility>

#include "gemm_int_loops.h"

namespace xk {
namespace {

struct Pairs {
  struct Sum {
    __m128i at[4];
  };
  struct Part {
    __m128i even[4], odd[4];
  };
  struct Inputs {
    __m128i even, odd;
  };
  static constexpr int kPlanes = 2, kRows1 = 2, kRows2 = 0, kRows4 = 0;

  static XK_INLINE void start(Sum& sum, int32_t init) {
    for (__m128i& part : sum.at) part = _mm_set1_epi32(init);
  }
  template <class W>
  static XK_INLINE Part part(const char* from, int unit) {
    const __m128i mask = _mm_set1_epi16(W::kUnits == 1 ? 255 : 15);
    Part part;
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(from) + h);
      if constexpr (W::kUnits == 1) {
        part.even[h] = _mm_and_si128(bytes, mask);
        part.odd[h] = _mm_srli_epi16(bytes, 8);
      } else {
        const __m128i even = unit == 0 ? bytes : _mm_srli_epi16(bytes, 4);
        const __m128i odd = _mm_srli_epi16(bytes, unit == 0 ? 8 : 12);
        part.even[h] = _mm_and_si128(even, mask);
        part.odd[h] = unit == 0 ? _mm_and_si128(odd, mask) : odd;
      }
    }
    return part;
  }
  static XK_INLINE Inputs spread(const uint32_t* x) {
    return {_mm_set1_epi32(static_cast<int32_t>(x[0])),
            _mm_set1_epi32(static_cast<int32_t>(x[kIntUnits]))};
  }
  static XK_INLINE void mac(Sum& sum, const Part& part, const Inputs& x) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      const __m128i even = _mm_madd_epi16(part.even[h], x.even);
      const __m128i odd = _mm_madd_epi16(part.odd[h], x.odd);
      sum.at[h] = _mm_add_epi32(sum.at[h], _mm_add_epi32(even, odd));
    }
  }
  static XK_INLINE void finish(const Sum& sum, float scale, const uint16_t* scales, bool first,
                               float* c) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      __m128 value = _mm_mul_ps(_mm_cvtepi32_ps(sum.at[h]), _mm_set1_ps(scale));
      if (scales != nullptr) {
        const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 4 * h));
        const __m128i wide = _mm_unpacklo_epi16(_mm_setzero_si128(), bits);
        value = _mm_mul_ps(value, _mm_castsi128_ps(wide));
      }
      if (!first) value = _mm_add_ps(_mm_loadu_ps(c + 4 * h), value);
      _mm_storeu_ps(c + 4 * h, value);
    }
  }
};

}  // namespace

void gemm_int_sse2(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
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
