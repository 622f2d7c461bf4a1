// The register tile of all products: R rows by B blocks of 16 outputs, accumulated over k in order.
//
// Included by each variant behind its `#pragma GCC target`; everything is local to the including
// file, so that no variant's code can stand in for another's.
//
// A source S says how weights are read and multiplied. A step reads 64 bytes of a block.
//   Part, kParts      the vector type and how many of it hold 16 outputs
//   kUnits            units of x that a step takes; a unit is 4 bytes (an fp32, a pair of bfloat16)
//   kRows1, 2, 4      the most rows of a tile of 1, 2, 4 blocks that stay in registers
//   weight(w, u, p)   the weights of unit u of a step
//   spread(x)         a unit of x in every lane
//   mac(acc, w, x)    acc + w x
#pragma once

#include <cstdint>

namespace xk {
namespace {

#define XK_INLINE inline __attribute__((always_inline))

constexpr int kBlock = 16;     // outputs of a block
constexpr int kLine = 16;      // units of x that stand together: 64 bytes of one row
constexpr int kStepBytes = 64;
constexpr int kMaxBlocks = 4;  // blocks of a tile

struct TileArguments {
  const char* weights[kMaxBlocks];
  const char* next[kMaxBlocks];  // what this thread reads after these weights
  const uint32_t* x;             // lines of the tile's rows in turn: [line][R][16]
  float* c;                      // [R][c_stride]
  int64_t c_stride;
  int32_t steps;
  int32_t ahead;        // bytes ahead of the weights that are prefetched before switch_step
  int32_t switch_step;  // from this step on (a whole line of x) `next` is prefetched
  int32_t next_stride;  // bytes of `next` a step
  bool resume;          // c holds the sum of earlier steps
};

using Tile = void (*)(const TileArguments&);

template <class S, int R, int B>
struct Sums {
  static constexpr int kWidth = kBlock / S::kParts;
  typename S::Part at[R][B][S::kParts];

  XK_INLINE void load(const TileArguments& a) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p)
          at[r][b][p] =
              a.resume ? S::load(a.c + r * a.c_stride + b * kBlock + p * kWidth) : S::zero();
  }

  XK_INLINE void store(const TileArguments& a) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p)
          S::store(a.c + r * a.c_stride + b * kBlock + p * kWidth, at[r][b][p]);
  }

  // One unit of x against its weights.
  XK_INLINE void add(const char* const (&w)[B], int unit, const uint32_t* x) {
    typename S::Part wide[B][S::kParts];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int p = 0; p < S::kParts; ++p) wide[b][p] = S::weight(w[b], unit, p);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto xr = S::spread(x + r * kLine);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p) at[r][b][p] = S::mac(at[r][b][p], wide[b][p], xr);
    }
  }
};

template <class S, int R, int B>
void tile(const TileArguments& a) {
  constexpr int kSteps = kLine / S::kUnits;  // steps of a line
  Sums<S, R, B> sums;
  sums.load(a);
  const uint32_t* x = a.x;
  const char* w[B];
  const char* fetched[B];
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) w[b] = a.weights[b], fetched[b] = w[b] + a.ahead;
  int64_t stride = kStepBytes;
  int step = 0;
  for (int end = a.switch_step;; end = a.steps) {
    while (step < end) {
      const int count = end - step < kSteps ? end - step : kSteps;
      for (int s = 0; s < count; ++s) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          __builtin_prefetch(fetched[b], 0, 2);
          fetched[b] += stride;
        }
#pragma GCC unroll 8
        for (int u = 0; u < S::kUnits; ++u) sums.add(w, u, x + s * S::kUnits + u);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) w[b] += kStepBytes;
      }
      x += R * kLine;
      step += count;
    }
    if (step >= a.steps) break;
    stride = a.next_stride;
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) fetched[b] = a.next[b];
  }
  sums.store(a);
}

template <class S, int B, int... R>
constexpr Tile choose_tile(int rows, std::integer_sequence<int, R...>) {
  constexpr Tile kTiles[] = {tile<S, R + 1, B>...};
  return kTiles[rows - 1];
}

// Blocks of the tile of `rows` rows, at most `most`.
template <class S>
constexpr int tile_blocks(int rows, int most) {
  return most >= 4 && rows <= S::kRows4 ? 4 : most >= 2 && rows <= S::kRows2 ? 2 : 1;
}

template <class S>
Tile tile_of(int rows, int blocks) {
  if constexpr (S::kRows4 > 0)
    if (blocks == 4) return choose_tile<S, 4>(rows, std::make_integer_sequence<int, S::kRows4>());
  if constexpr (S::kRows2 > 0)
    if (blocks == 2) return choose_tile<S, 2>(rows, std::make_integer_sequence<int, S::kRows2>());
  if constexpr (S::kRows1 > 0)
    return choose_tile<S, 1>(rows, std::make_integer_sequence<int, S::kRows1>());
  return nullptr;
}

// The most rows of any tile.
template <class S>
constexpr int tile_rows() {
  return S::kRows1 > S::kRows2 ? S::kRows1 : S::kRows2;
}

}  // namespace
}  // namespace xk
