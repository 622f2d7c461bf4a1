// The number types of weights and KV that C++ has no name for.
#pragma once

#include <cstdint>
#include <cstring>

namespace xk {

struct Bf16 {
  uint16_t bits;
};

// Rounds to nearest, ties to even; a NaN stays one.
inline Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float to_float(float value) { return value; }

}  // namespace xk
