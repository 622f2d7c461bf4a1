// The register tile of quantized products: R rows by B blocks, group by group.
// Included behind a variant's target pragma; local to the including file.
//
// A source S says how integers are multiplied:
//   Sum, Part         the running sum of a row and block; the weights of a unit of a block
//   kPlanes           words of 4 bytes that a row has for a unit of x, 16 units apart
//   start(sum, init)  a sum that begins with `init` in every output
//   part<W>(w, unit)  the weights of a unit, from the 64 bytes at w that hold it
//   mac(sum, part, x) adds a unit: x points to the row's first word of it
//   finish(...)       turns a sum to fp32, scales it and adds it to c
#pragma once

#include <cstdint>

#include "gemm_int.h"

namespace xk {
namespace {

#ifndef XK_INLINE
#define XK_INLINE inline __attribute__((always_inline))
#endif

constexpr int kIntUnits = 16;     // of a line
constexpr int kIntMaxBlocks = 4;  // of a tile

// Bytes: a weight a byte. Halves: two.
struct Bytes {
  static constexpr int kZero = 128, kUnits = 1, kLineBytes = 1024;
};
struct Halves {
  static constexpr int kZero = 8, kUnits = 2, kLineBytes = 512;
};

// What a row's group of inputs is multiplied by, and the sum of its integers.
struct RowGroup {
  float scale;
  int32_t sum;
};

struct IntTileArguments {
  const char* weights[kIntMaxBlocks];
  const char* next[kIntMaxBlocks];         // what this thread reads after these weights
  const uint16_t* scales[kIntMaxBlocks];   // bfloat16 [group][16], or null
  const uint32_t* x;       // [line][R][planes][16]
  const RowGroup* groups;  // [group][R]
  float* c;                // [R][c_stride]
  int64_t c_stride;
  int32_t lines;
  int32_t group_lines;
  int32_t zero;            // of the weights
  int32_t ahead;           // bytes of a block that are prefetched ahead; behind its end, `next`
  bool resume;             // c holds the sum of earlier lines
};

using IntTile = void (*)(const IntTileArguments&);

// The lines [line, end) of one group.
template <class S, class W, int R, int B>
XK_INLINE void add_lines(typename S::Sum (&sums)[R][B], const char* (&w)[B],
                         const char* (&fetched)[B], const uint32_t* x, int count) {
  for (int line = 0; line < count; ++line, x += R * S::kPlanes * kIntUnits) {
    for (int step = 0; step < kIntUnits / W::kUnits; ++step) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        __builtin_prefetch(fetched[b], 0, 2);
        fetched[b] += 64;
      }
#pragma GCC unroll 2
      for (int u = 0; u < W::kUnits; ++u) {
        typename S::Part parts[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) parts[b] = S::template part<W>(w[b], u);
        const uint32_t* unit = x + step * W::kUnits + u;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const auto xr = S::spread(unit + r * S::kPlanes * kIntUnits);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b) S::mac(sums[r][b], parts[b], xr);
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) w[b] += 64;
    }
  }
}

template <class S, class W, int R, int B>
void int_tile(const IntTileArguments& a) {
  const char* w[B];
  const char* fetched[B];
  const int switch_line = a.lines - a.ahead / W::kLineBytes;
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    w[b] = a.weights[b];
    fetched[b] = switch_line > 0 ? w[b] + a.ahead : a.next[b];
  }
  const uint32_t* x = a.x;
  const RowGroup* row_groups = a.groups;
  int group = 0;
  for (int line = 0; line < a.lines; ++group, row_groups += R) {
    const int count = a.lines - line < a.group_lines ? a.lines - line : a.group_lines;
    typename S::Sum sums[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) S::start(sums[r][b], -a.zero * row_groups[r].sum);
    for (int part = line; part < line + count;) {
      const int end = part < switch_line && switch_line < line + count ? switch_line : line + count;
      add_lines<S, W, R, B>(sums, w, fetched, x, end - part);
      x += (end - part) * R * S::kPlanes * kIntUnits;
      part = end;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        if (part == switch_line) fetched[b] = a.next[b];
    }
    const bool first = line == 0 && !a.resume;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        S::finish(sums[r][b], row_groups[r].scale,
                  a.scales[b] ? a.scales[b] + group * 16 : nullptr, first,
                  a.c + r * a.c_stride + b * 16);
    line += count;
  }
}

template <class S, class W, int B, int... R>
constexpr IntTile choose_int_tile(int rows, std::integer_sequence<int, R...>) {
  constexpr IntTile kTiles[] = {int_tile<S, W, R + 1, B>...};
  return kTiles[rows - 1];
}

// The tile of `rows` rows by 1, 2 or 4 blocks.
template <class S, class W>
IntTile int_tile_of(int rows, int blocks) {
  if constexpr (S::kRows4 > 0)
    if (blocks == 4)
      return choose_int_tile<S, W, 4>(rows, std::make_integer_sequence<int, S::kRows4>());
  if constexpr (S::kRows2 > 0)
    if (blocks == 2)
      return choose_int_tile<S, W, 2>(rows, std::make_integer_sequence<int, S::kRows2>());
  if constexpr (S::kRows1 > 0)
    return choose_int_tile<S, W, 1>(rows, std::make_integer_sequence<int, S::kRows1>());
  return nullptr;
}

template <class S>
constexpr int int_tile_blocks(int rows, int most) {
  return most >= 4 && rows <= S::kRows4 ? 4 : most >= 2 && rows <= S::kRows2 ? 2 : 1;
}

template <class S>
constexpr int int_tile_rows() {
  return S::kRows1 > S::kRows2 ? S::kRows1 : S::kRows2;
}

}  // namespace
}  // namespace xk
