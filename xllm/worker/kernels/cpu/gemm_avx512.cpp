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
  static constexpr int kParts = 1, kRows1 = 13, kRows2 = 13, kRows4 = 6;
  static constexpr int kHeldBlocks = 0;
  static XK_INLINE Part zero() { return _mm512_setzero_ps(); }
  static XK_INLINE Part load(const float* from) { return _mm512_loadu_ps(from); }
  static XK_INLINE void store(float* to, Part part) { _mm512_storeu_ps(to, part); }
  static XK_INLINE Part spread(const uint32_t* x) {
    return _mm512_set1_ps(*reinterpret_cast<const float*>(x));
  }
  // As assembly: left alone, GCC copies sums among registers and spills them.
  static XK_INLINE void mac(Part& acc, Part w, Part x) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
};

struct Fp32 : Lanes {
  static constexpr int kUnits = 1;
  static XK_INLINE Part weight(const char* w, int, int) { return _mm512_load_ps(w); }
};

// A load to a whole register takes as long as two multiply-adds (measured on Ice Lake, broadcasts
// included), so pairs are loaded once for both units where registers allow.
struct Bf16 : Lanes {
  using Held = Words;
  static constexpr int kUnits = 2, kHeldBlocks = 2;
  static XK_INLINE Held hold(const char* w) {
    Held pairs = *reinterpret_cast<const Words*>(w);
    asm("" : "+v"(pairs));  // or GCC folds the load into both uses
    return pairs;
  }
  static XK_INLINE Part expand(Held pairs, int unit) {
    if (unit == 0) return reinterpret_cast<Part>(pairs << 16);
    // By a mask register: one of the vectors holds a sum.
    return _mm512_castsi512_ps(
        _mm512_maskz_mov_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(pairs)));
  }
  static XK_INLINE Part weight(const char* w, int unit, int) {
    const Words pairs = *reinterpret_cast<const Words*>(w);
    return reinterpret_cast<Part>(unit == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
};

}  // namespace

void gemm_avx512(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                 int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const Call call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kFp32)
    product<Fp32, Fp32, FloatLines>(call);
  else
    product<Bf16, Bf16, FloatLines>(call);
}

}  // namespace xk
#endif
