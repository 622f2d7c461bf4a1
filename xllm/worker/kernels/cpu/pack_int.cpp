// Quantizing and packing: rows of a weight to unsigned integers around a zero, with scales.
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm_int.h"
#include "numbers.h"

namespace xk {
namespace {

constexpr int kBlock = 16;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// The number of least steps of a byte is 127 in both directions; of a half, 8 downwards and 7
// upwards: the largest magnitude of a group becomes 8 below the zero, whatever its sign.
constexpr float kMost8 = 127.0f, kMost4 = 8.0f;

// The number of the largest magnitude, the negative one of two; a NaN where there is one.
float largest(const float* from, int32_t count) {
  uint32_t most = 0;
  for (int32_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t key = bits << 1 | bits >> 31;
    most = key > most ? key : most;
  }
  const uint32_t bits = most >> 1 | most << 31;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

bool usable(float scale) { return std::fabs(scale) >= 1e-30f && std::fabs(scale) < INFINITY; }
bool lost(float scale) { return !(std::fabs(scale) < INFINITY); }

int32_t rounded(float value) {
  const float shifted = value + kMagic;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

// Integers around `zero` of `count` numbers, `high` at most. Where the scale is none they are zeros.
void round_group(const float* from, int32_t count, float scale, int32_t zero, int32_t high,
                 uint8_t* to) {
  if (!usable(scale)) {
    std::memset(to, zero, static_cast<size_t>(count));
    return;
  }
  const float factor = 1.0f / scale;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t number = rounded(from[i] * factor) + zero;
    to[i] = static_cast<uint8_t>(number > high ? high : number);
  }
}

// One row: its integers, and its scales (one, or bfloat16 ones 16 apart).
void quantize_row(int32_t kind, int32_t group, const float* row, int32_t k, uint8_t* to,
                  void* scales) {
  if (kind != kInt4) {
    const float scale = std::fabs(largest(row, k)) / kMost8;
    *static_cast<float*>(scales) = lost(scale) ? NAN : usable(scale) ? scale : 0.0f;
    round_group(row, k, scale, 128, 255, to);
    return;
  }
  auto* own = static_cast<uint16_t*>(scales);
  for (int32_t start = 0; start < k; start += group, own += kBlock) {
    const int32_t count = k - start < group ? k - start : group;
    const Bf16 bits = to_bf16(largest(row + start, count) / -kMost4);
    const float scale = to_float(bits);
    *own = lost(scale) ? 0x7fc0 : usable(scale) ? bits.bits : 0;
    round_group(row + start, count, scale, 8, 15, to + start);
  }
}

// The integers of 16 rows, in lines.
void turn(int32_t kind, const uint8_t* rows, int64_t ld, int64_t lines, uint8_t* to) {
  for (int64_t unit = 0; unit < lines * kIntLine / 4; unit += kind == kInt4 ? 2 : 1, to += 64)
    for (int o = 0; o < kBlock; ++o) {
      const uint8_t* from = rows + o * ld + unit * 4;
      for (int i = 0; i < 4; ++i)
        to[o * 4 + i] = static_cast<uint8_t>(kind == kInt4 ? from[i] | from[i + 4] << 4 : from[i]);
    }
}

}  // namespace

int64_t int_packed_bytes(int32_t kind, int64_t n, int32_t k) {
  return (n + kBlock - 1) / kBlock * int_lines(k) * int_line_bytes(kind);
}

void pack_int_rows(int32_t kind, int32_t group, const void* source, SourceType type, int64_t rows,
                   int32_t k, int64_t ld, void* packed, void* scales, int64_t first_block,
                   int64_t last_block, int64_t first, int64_t stride) {
  const int64_t lines = int_lines(k), width = lines * kIntLine;
  const int64_t scale_bytes = kind == kInt4 ? (k + group - 1) / group * kBlock * 2 : kBlock * 4;
  const int scale_step = kind == kInt4 ? 2 : 4;
  std::vector<float> row(static_cast<size_t>(k));
  std::vector<uint8_t> integers(static_cast<size_t>(kBlock * width));
  for (int64_t block = first_block; block < last_block; ++block) {
    std::memset(integers.data(), 0, integers.size());
    const int64_t place = first + stride * block;
    char* own_scales = static_cast<char*>(scales) + place * scale_bytes;
    for (int o = 0; o < kBlock; ++o) {
      if (block * kBlock + o >= rows) continue;
      read_numbers(source, type, (block * kBlock + o) * ld, k, row.data());
      quantize_row(kind, group, row.data(), k, integers.data() + o * width,
                   own_scales + o * scale_step);
    }
    turn(kind, integers.data(), width, lines,
         static_cast<uint8_t*>(packed) + place * lines * int_line_bytes(kind));
  }
}

}  // namespace xk
