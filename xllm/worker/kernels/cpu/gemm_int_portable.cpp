// Quantized products on any CPU.
#include <type_traits>
#include <utility>

#include "gemm_int_loops.h"
#include "gemm_int_variants.h"

namespace xk {
namespace {

struct Plain {
  struct Sum {
    uint32_t at[16];  // wraps
  };
  struct Part {
    int32_t at[64];
  };
  struct Inputs {
    int32_t at[4];
  };
  static constexpr int kPlanes = 2, kRows1 = 4, kRows2 = 0, kRows4 = 0;

  static void start(Sum& sum, int32_t init) {
    for (uint32_t& value : sum.at) value = static_cast<uint32_t>(init);
  }
  template <class W>
  static Part part(const char* from, int unit) {
    Part part;
    for (int i = 0; i < 64; ++i) {
      const auto byte = static_cast<uint8_t>(from[i]);
      part.at[i] = W::kUnits == 1 ? byte : unit == 0 ? byte & 15 : byte >> 4;
    }
    return part;
  }
  static Inputs spread(const uint32_t* x) {
    const uint32_t even = x[0], odd = x[kIntUnits];
    return {{static_cast<int16_t>(even), static_cast<int16_t>(odd),
             static_cast<int16_t>(even >> 16), static_cast<int16_t>(odd >> 16)}};
  }
  static void mac(Sum& sum, const Part& part, const Inputs& x) {
    for (int o = 0; o < 16; ++o) {
      int32_t value = 0;
      for (int i = 0; i < 4; ++i) value += part.at[4 * o + i] * x.at[i];
      sum.at[o] += static_cast<uint32_t>(value);
    }
  }
  static void finish(const Sum& sum, float scale, const uint16_t* scales, bool first, float* c) {
    for (int o = 0; o < 16; ++o) {
      float value = static_cast<float>(static_cast<int32_t>(sum.at[o])) * scale;
      if (scales != nullptr) {
        const uint32_t bits = static_cast<uint32_t>(scales[o]) << 16;
        float own;
        __builtin_memcpy(&own, &bits, 4);
        value *= own;
      }
      c[o] = first ? value : c[o] + value;
    }
  }
};

}  // namespace

void gemm_int_portable(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                       int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const IntCall call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  if (weight.kind == kW8A8)
    int_product<Plain, Bytes, EvenOdd<kMost8>>(call);
  else if (weight.kind == kInt4)
    int_product<Plain, Halves, EvenOdd<kMost16>>(call);
  else
    int_product<Plain, Bytes, EvenOdd<kMost16>>(call);
}

}  // namespace xk
