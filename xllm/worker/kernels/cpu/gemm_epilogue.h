// What happens to sums before they are stored: scale, bias, residual, silu(gate) * up.
// Included behind a variant's target pragma; local to the including file.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace xk {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExpBound = 87.0f;

// A block of outputs, as the compiler's own vectors: each target lowers them to its registers.
// Loops over 16 floats were left scalar where they hold a choice or a reinterpretation.
typedef float BlockFloats __attribute__((vector_size(64)));
typedef uint32_t BlockBits __attribute__((vector_size(64)));

// Blocks travel by reference: by value they would be passed as each target's ABI has it.
inline void load_block(const float* from, BlockFloats& block) {
  __builtin_memcpy(&block, from, sizeof block);
}

inline void store_block(const BlockFloats& block, float* to) {
  __builtin_memcpy(to, &block, sizeof block);
}

// x to e^x for |x| <= 87, beyond that e^±87: range reduction by ln 2 in two parts, then the Taylor
// series of degree 7 (error below 1e-7 of the value). NaN stays NaN.
inline void exponential(BlockFloats& x) {
  x = x > kExpBound ? BlockFloats{} + kExpBound : x;
  x = x < -kExpBound ? BlockFloats{} - kExpBound : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const BlockFloats shifted = x * kLog2E + kMagic;
  const BlockFloats n = shifted - kMagic;
  const BlockFloats r = (x - n * kLn2High) - n * kLn2Low;
  BlockFloats p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const BlockBits power = (reinterpret_cast<BlockBits>(shifted) + 127u) << 23;
  x = p * reinterpret_cast<BlockFloats>(power);  // 2^n: the low bits of `shifted` hold n
}

// gate to silu(gate) * up.
inline void gated(BlockFloats& gate, const BlockFloats& up) {
  BlockFloats power = -gate;
  exponential(power);
  gate = gate / (power + 1.0f) * up;
}

// One block of sums as the caller sees them: scaled and with the bias.
inline void finish(const Weight& weight, int64_t block, const float* c, BlockFloats& out) {
  load_block(c, out);
  BlockFloats more;
  if (weight.scales != nullptr && weight.kind != kInt4) {
    load_block(weight.scales + block * 16, more);
    out *= more;
  }
  if (weight.bias != nullptr) {
    load_block(weight.bias + block * 16, more);
    out += more;
  }
}

// Stores `count` blocks (a multiple of 2 for kSiluMul) of `rows` rows of sums.
void store_sums(const Weight& weight, Epilogue epilogue, int64_t first_block, int count,
                const float* c, int64_t c_stride, int rows, float* y, int64_t ldy) {
  const int step = epilogue == kSiluMul ? 2 : 1;
  const int64_t num_outputs = epilogue == kSiluMul ? weight.n / 2 : weight.n;
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < count; b += step) {
      const int64_t o = (first_block + b) / step * 16;
      const int64_t valid = num_outputs - o < 16 ? num_outputs - o : 16;
      const float* from = c + r * c_stride + b * 16;
      BlockFloats out, other;
      finish(weight, first_block + b, from, out);
      if (epilogue == kSiluMul) {
        finish(weight, first_block + b + 1, from + 16, other);
        gated(out, other);
      }
      float* to = y + r * ldy + o;
      if (valid == 16) {
        if (epilogue == kAdd) {
          load_block(to, other);
          out = other + out;
        }
        store_block(out, to);
      } else {
        for (int i = 0; i < valid; ++i) to[i] = epilogue == kAdd ? to[i] + out[i] : out[i];
      }
    }
  }
}

}  // namespace
}  // namespace xk
