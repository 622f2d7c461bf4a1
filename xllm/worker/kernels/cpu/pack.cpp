#include "pack.h"

#include <cstring>

#include "gemm_int.h"

namespace xk {
namespace {

constexpr int kBlock = 16;
constexpr int kRun = 32;  // inputs of 16 rows turned at a time

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = (magnitude << 13) + 0x38000000u;  // exponent bias 15 to 127
  if (magnitude >= 0x7c00u) bits = (magnitude << 13) | 0x7f800000u;
  float value;
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400u) value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

float to_float(const void* source, SourceType type, int64_t index) {
  if (type == kFromFp32) return static_cast<const float*>(source)[index];
  const uint16_t bits = static_cast<const uint16_t*>(source)[index];
  if (type == kFromFp16) return from_half(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Rounds to nearest, ties to even; NaN stays one.
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 16 rows by kRun inputs, already in the packed type, as rows.
template <class T>
struct Rows {
  alignas(64) T at[kBlock][kRun];
};

template <class T>
T convert(const void* source, SourceType type, int64_t index) {
  const float value = to_float(source, type, index);
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return to_bf16(value);
}

template <class T>
void read_rows(const void* source, SourceType type, int64_t first, int64_t rows, int64_t ld,
               int32_t start, int32_t count, Rows<T>& run) {
  const bool same = sizeof(T) == 2 ? type == kFromBf16 : type == kFromFp32;
  for (int o = 0; o < kBlock; ++o) {
    T* to = run.at[o];
    if (o >= rows || count < kRun) std::memset(to, 0, sizeof run.at[o]);
    if (o >= rows) continue;
    const int64_t from = (first + o) * ld + start;
    if (same)
      std::memcpy(to, static_cast<const T*>(source) + from, static_cast<size_t>(count) * sizeof(T));
    else
      for (int32_t i = 0; i < count; ++i) to[i] = convert<T>(source, type, from + i);
  }
}

// bfloat16: pairs of inputs stay together.
void turn_pairs(const Rows<uint16_t>& run, int32_t pairs, uint32_t* to) {
  for (int o = 0; o < kBlock; ++o) {
    uint32_t row[kRun / 2];
    std::memcpy(row, run.at[o], sizeof row);
    for (int32_t p = 0; p < pairs; ++p) to[p * kBlock + o] = row[p];
  }
}

void turn_floats(const Rows<float>& run, int32_t count, float* to) {
  for (int o = 0; o < kBlock; ++o)
    for (int32_t i = 0; i < count; ++i) to[i * kBlock + o] = run.at[o][i];
}

}  // namespace

void read_numbers(const void* source, SourceType type, int64_t first, int64_t count, float* to) {
  if (type == kFromFp32) {
    std::memcpy(to, static_cast<const float*>(source) + first, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source) + first;
  for (int64_t i = 0; type == kFromBf16 && i < count; ++i) {
    const uint32_t wide = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &wide, 4);
  }
  for (int64_t i = 0; type == kFromFp16 && i < count; ++i) to[i] = from_half(from[i]);
}

int64_t packed_bytes(int32_t kind, int64_t n, int32_t k) {
  if (is_integer(kind)) return int_packed_bytes(kind, n, k);
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (kind == kFp32) return blocks * k * kBlock * 4;
  return blocks * ((k + 1) / 2) * kBlock * 4;
}

void pack_rows(int32_t kind, const void* source, SourceType type, int64_t rows, int32_t k,
               int64_t ld, void* packed, int64_t first_block, int64_t last_block, int64_t stride) {
  const int64_t bytes = packed_bytes(kind, kBlock, k);
  Rows<uint16_t> pairs;
  Rows<float> floats;
  for (int64_t block = first_block; block < last_block; ++block) {
    char* to = static_cast<char*>(packed) + block * stride * bytes;
    const int64_t left = rows - block * kBlock;
    for (int32_t start = 0; start < k; start += kRun) {
      const int32_t count = k - start < kRun ? k - start : kRun;
      if (kind == kFp32) {
        read_rows(source, type, block * kBlock, left, ld, start, count, floats);
        turn_floats(floats, count, reinterpret_cast<float*>(to) + start * kBlock);
      } else {
        read_rows(source, type, block * kBlock, left, ld, start, count, pairs);
        turn_pairs(pairs, (count + 1) / 2, reinterpret_cast<uint32_t*>(to) + start / 2 * kBlock);
      }
    }
  }
}

}  // namespace xk
