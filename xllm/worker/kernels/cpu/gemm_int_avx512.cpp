// AVX-512 without VNNI: as AVX2, a block a register.
#include "gemm_int_variants.h"

#if defined(__x86_64__)
// GCC's own headers trip these.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#include "gemm_int_loops.h"

namespace xk {
namespace {

struct Pairs {
  using Sum = __m512i;
  struct Part {
    __m512i even, odd;
  };
  struct Inputs {
    __m512i even, odd;
  };
  static constexpr int kPlanes = 2, kRows1 = 0, kRows2 = 10, kRows4 = 4;

  static XK_INLINE void start(Sum& sum, int32_t init) { sum = _mm512_set1_epi32(init); }
  template <class W>
  static XK_INLINE Part part(const char* from, int unit) {
    const __m512i bytes = _mm512_load_si512(from);
    const __m512i mask = _mm512_set1_epi16(W::kUnits == 1 ? 255 : 15);
    if constexpr (W::kUnits == 1)
      return {_mm512_and_si512(bytes, mask), _mm512_srli_epi16(bytes, 8)};
    const __m512i even = unit == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
    const __m512i odd = _mm512_srli_epi16(bytes, unit == 0 ? 8 : 12);
    return {_mm512_and_si512(even, mask), unit == 0 ? _mm512_and_si512(odd, mask) : odd};
  }
  static XK_INLINE Inputs spread(const uint32_t* x) {
    return {_mm512_set1_epi32(static_cast<int32_t>(x[0])),
            _mm512_set1_epi32(static_cast<int32_t>(x[kIntUnits]))};
  }
  static XK_INLINE void mac(Sum& sum, const Part& part, const Inputs& x) {
    const __m512i even = _mm512_madd_epi16(part.even, x.even);
    const __m512i odd = _mm512_madd_epi16(part.odd, x.odd);
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
  }
  static XK_INLINE void finish(const Sum& sum, float scale, const uint16_t* scales, bool first,
                               float* c) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
    if (scales != nullptr) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
      value = _mm512_mul_ps(value, _mm512_castsi512_ps(wide));
    }
    _mm512_storeu_ps(c, first ? value : _mm512_add_ps(_mm512_loadu_ps(c), value));
  }
};

}  // namespace

void gemm_int_avx512(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
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
