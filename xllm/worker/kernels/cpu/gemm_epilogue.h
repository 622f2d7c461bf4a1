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

// e^x for |x| <= 87, beyond that e^±87: range reduction by ln 2 in two parts, then the Taylor
// series of degree 7 (error below 1e-7 of the value). NaN stays NaN. Vectorizes.
inline float exponential(float x) {
  x = x > kExpBound ? kExpBound : x;
  x = x < -kExpBound ? -kExpBound : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * kLog2E + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  const uint32_t power = (static_cast<uint32_t>(bits) + 127u) << 23;  // 2^n: the low bits hold n
  float scale;
  __builtin_memcpy(&scale, &power, 4);
  return p * scale;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// One block of 16 sums as the caller sees them: scaled and with the bias.
inline void finish(const Weight& weight, int64_t block, const float* c, float (&out)[16]) {
  for (int i = 0; i < 16; ++i) out[i] = c[i];
  if (weight.scales != nullptr && weight.kind != kInt4)
    for (int i = 0; i < 16; ++i) out[i] *= weight.scales[block * 16 + i];
  if (weight.bias != nullptr)
    for (int i = 0; i < 16; ++i) out[i] += weight.bias[block * 16 + i];
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
      float out[16];
      finish(weight, first_block + b, c + r * c_stride + b * 16, out);
      if (epilogue == kSiluMul) {
        float up[16];
        finish(weight, first_block + b + 1, c + r * c_stride + (b + 1) * 16, up);
        for (int i = 0; i < 16; ++i) out[i] = silu(out[i]) * up[i];
      }
      float* to = y + r * ldy + o;
      if (valid == 16) {
        if (epilogue == kAdd)
          for (int i = 0; i < 16; ++i) out[i] += to[i];
        for (int i = 0; i < 16; ++i) to[i] = out[i];
      } else {
        for (int i = 0; i < valid; ++i) to[i] = epilogue == kAdd ? to[i] + out[i] : out[i];
      }
    }
  }
}

}  // namespace
}  // namespace xk
