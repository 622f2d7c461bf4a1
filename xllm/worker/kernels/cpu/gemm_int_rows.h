// Rows of x to integers, as the tiles of quantized products read them.
// Included behind a variant's target pragma; local to the including file.
#pragma once

#include "gemm_int_tile.h"

namespace xk {
namespace {

constexpr int kMost16 = 32639;  // 127 * 256 + 127: both its bytes are signed
constexpr int kMost8 = 127;
constexpr float kTiny = 1e-30f;  // a group below is taken for zeros

// The largest magnitude; NaN where there is one.
inline float largest(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float value;
  __builtin_memcpy(&value, &most, 4);
  return value;
}

// 64 numbers times `factor` to whole ones, nearest, ties to even; their sum is added to `sum`.
inline void round_line(const float* x, float factor, int32_t (&to)[kIntLine], int32_t& sum) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  int32_t total = 0;
  for (int i = 0; i < kIntLine; ++i) {
    const float shifted = x[i] * factor + kMagic;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    to[i] = bits - 0x4b400000;
    total += to[i];
  }
  sum += total;
}

// How a line of integers is laid out: X::put(line, to), X::kPlanes words a unit.
struct HighLow {  // bytes of the high halves, then of the low ones, both signed
  static constexpr int kPlanes = 2, kMost = kMost16;
  static void put(const int32_t (&line)[kIntLine], uint32_t* to) {
    auto* high = reinterpret_cast<int8_t*>(to);
    auto* low = reinterpret_cast<int8_t*>(to + kIntUnits);
    for (int i = 0; i < kIntLine; ++i) {
      low[i] = static_cast<int8_t>(line[i]);
      high[i] = static_cast<int8_t>((line[i] - low[i]) >> 8);
    }
  }
};

struct Bytes8 {
  static constexpr int kPlanes = 1, kMost = kMost8;
  static void put(const int32_t (&line)[kIntLine], uint32_t* to) {
    auto* bytes = reinterpret_cast<int8_t*>(to);
    for (int i = 0; i < kIntLine; ++i) bytes[i] = static_cast<int8_t>(line[i]);
  }
};

template <int most>
struct EvenOdd {  // words of 16 bits: inputs 0 and 2 of each unit, then 1 and 3
  static constexpr int kPlanes = 2, kMost = most;
  static void put(const int32_t (&line)[kIntLine], uint32_t* to) {
    for (int u = 0; u < kIntUnits; ++u) {
      const int32_t* x = line + 4 * u;
      to[u] = (static_cast<uint32_t>(x[0]) & 0xffffu) | static_cast<uint32_t>(x[2]) << 16;
      to[u + kIntUnits] = (static_cast<uint32_t>(x[1]) & 0xffffu) | static_cast<uint32_t>(x[3]) << 16;
    }
  }
};

// One row of k numbers: line l goes to lines + l * line_stride words, group g to groups + g *
// group_stride. What is not finite makes its group's scale NaN.
template <class X>
void quantize_row(const float* x, int32_t k, int32_t group, uint32_t* lines, int64_t line_stride,
                  RowGroup* groups, int64_t group_stride) {
  for (int64_t start = 0; start < k; start += group, groups += group_stride) {
    const int64_t count = k - start < group ? k - start : group;
    const float top = largest(x + start, count);
    const bool usual = top >= kTiny && top < __builtin_inff();
    const float factor = usual ? static_cast<float>(X::kMost) / top : 0.0f;
    groups->scale = usual ? top / static_cast<float>(X::kMost) : top < kTiny ? 0.0f : __builtin_nanf("");
    groups->sum = 0;
    for (int64_t at = start; at < start + count; at += kIntLine, lines += line_stride) {
      alignas(64) int32_t line[kIntLine];
      alignas(64) float padded[kIntLine];
      const float* from = x + at;
      const int64_t left = usual ? start + count - at : 0;
      if (left < kIntLine) {
        __builtin_memset(padded, 0, sizeof padded);
        if (left > 0) __builtin_memcpy(padded, from, static_cast<size_t>(left) * 4);
        from = padded;
      }
      round_line(from, factor, line, groups->sum);
      X::put(line, lines);
    }
  }
}

}  // namespace
}  // namespace xk
