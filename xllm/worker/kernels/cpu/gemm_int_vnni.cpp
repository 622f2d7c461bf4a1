// AVX-512 VNNI: four products of a byte of x with a byte of a weight an instruction and output; x
// of 16 bits as two bytes with a sum each.
#include "gemm_int_variants.h"

#if defined(__x86_64__)
// GCC's own headers trip these.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

#include "gemm_int_loops.h"

namespace xk {
namespace {

struct Vectors {
  using Part = __m512i;

  template <class W>
  static XK_INLINE Part part(const char* from, int unit) {
    const __m512i bytes = _mm512_load_si512(from);
    if constexpr (W::kUnits == 1) return bytes;
    const __m512i own = unit == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
    return _mm512_and_si512(own, _mm512_set1_epi8(15));
  }
  // GCC 12 copies sums about the registers where it knows what is done to them.
  static XK_INLINE void add_products(__m512i& sum, __m512i part, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(part), "v"(x));
  }
  static XK_INLINE __m512i word(const uint32_t* x) {
    return _mm512_set1_epi32(static_cast<int32_t>(*x));
  }
  static XK_INLINE void add_to(__m512i total, float scale, const uint16_t* scales, bool first,
                               float* c) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(scale));
    if (scales != nullptr) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
      value = _mm512_mul_ps(value, _mm512_castsi512_ps(wide));
    }
    _mm512_storeu_ps(c, first ? value : _mm512_add_ps(_mm512_loadu_ps(c), value));
  }
};

struct Two : Vectors {  // x of 16 bits
  struct Sum {
    __m512i high, low;
  };
  struct Inputs {
    __m512i high, low;
  };
  static constexpr int kPlanes = 2, kRows1 = 0, kRows2 = 6, kRows4 = 3;

  static XK_INLINE void start(Sum& sum, int32_t init) {
    sum.high = _mm512_setzero_si512();
    sum.low = _mm512_set1_epi32(init);
  }
  static XK_INLINE Inputs spread(const uint32_t* x) { return {word(x), word(x + kIntUnits)}; }
  static XK_INLINE void mac(Sum& sum, Part part, const Inputs& x) {
    add_products(sum.high, part, x.high);
    add_products(sum.low, part, x.low);
  }
  static XK_INLINE void finish(const Sum& sum, float scale, const uint16_t* scales, bool first,
                               float* c) {
    add_to(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low), scale, scales, first, c);
  }
};

struct One : Vectors {  // x of 8 bits
  using Sum = __m512i;
  using Inputs = __m512i;
  static constexpr int kPlanes = 1, kRows1 = 0, kRows2 = 12, kRows4 = 6;

  static XK_INLINE void start(Sum& sum, int32_t init) { sum = _mm512_set1_epi32(init); }
  static XK_INLINE Inputs spread(const uint32_t* x) { return word(x); }
  static XK_INLINE void mac(Sum& sum, Part part, Inputs x) {
    add_products(sum, part, x);
  }
  static XK_INLINE void finish(Sum sum, float scale, const uint16_t* scales, bool first, float* c) {
    add_to(sum, scale, scales, first, c);
  }
};

}  // namespace

void gemm_int_vnni(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                   int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const IntCall call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kW8A8)
    int_product<One, Bytes, Bytes8>(call);
  else if (weight.kind == kInt4)
    int_product<Two, Halves, HighLow>(call);
  else
    int_product<Two, Bytes, HighLow>(call);
}

}  // namespace xk
#endif
