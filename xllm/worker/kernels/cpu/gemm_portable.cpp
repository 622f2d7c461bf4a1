// Any CPU: vectors of four floats as the compiler has them, no fused multiply-add.
#include <type_traits>
#include <utility>

#include "gemm_loops.h"

namespace xk {
namespace {

typedef float Floats __attribute__((vector_size(16), may_alias, aligned(4)));
typedef uint32_t Words __attribute__((vector_size(16), may_alias));

struct Lanes {
  using Part = Floats;
  static constexpr int kParts = 4, kRows1 = 3, kRows2 = 1, kRows4 = 0;
  static constexpr int kHeldBlocks = 0;
  static XK_INLINE Part zero() { return Part{}; }
  static XK_INLINE Part load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
  static XK_INLINE void store(float* to, Part part) { *reinterpret_cast<Floats*>(to) = part; }
  static XK_INLINE Part spread(const uint32_t* x) {
    float value;
    __builtin_memcpy(&value, x, 4);
    return Part{value, value, value, value};
  }
  static XK_INLINE void mac(Part& acc, Part w, Part x) { acc = acc + w * x; }
};

struct Fp32 : Lanes {
  static constexpr int kUnits = 1;
  static XK_INLINE Part weight(const char* w, int, int part) {
    return *reinterpret_cast<const Floats*>(w + part * 16);
  }
};

struct Bf16 : Lanes {
  static constexpr int kUnits = 2;
  static XK_INLINE Part weight(const char* w, int unit, int part) {
    const Words pairs = *reinterpret_cast<const Words*>(w + part * 16);
    return reinterpret_cast<Part>(unit == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  static void widen(const char* from, int steps, char* to) {
    for (int s = 0; s < steps; ++s, from += kStepBytes)
      for (int unit = 0; unit < kUnits; ++unit, to += kStepBytes)
        for (int part = 0; part < kParts; ++part)
          store(reinterpret_cast<float*>(to) + part * 4, weight(from, unit, part));
  }
};

}  // namespace

void gemm_portable(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                   int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const Call call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kFp32)
    product<Fp32, Fp32, FloatLines>(call);
  else
    product<Bf16, Fp32, FloatLines>(call);
}

}  // namespace xk
