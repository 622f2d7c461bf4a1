// The register tile of all products: R rows by B blocks of 16 outputs, accumulated over k in order.
//
// Included by each variant behind its `#pragma GCC target`; everything is local to the including
// file, so that no variant's code can stand in for another's.
//
// A source S says how weights are read and multiplied. A step reads 64 bytes of a block.
//   Part, kParts      the vector type and how many of it hold 16 outputs
//   kUnits            units of x that a step takes; a unit is 4 bytes (an fp32, a pair of bfloat16)
//   kRows4, 2, 1      the most rows of a tile of 4, 2, 1 blocks that stay in registers
//   weight(w, u, p)   the weights of unit u of a step
//   spread(x)         a unit of x in every lane
//   mac(acc, w, x)    acc += w x
//   kHeldBlocks       tiles of so many blocks keep a step's weights in a register for all units
//                     (hold, expand) instead of reading them again for each; 0: none do
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
  bool resume;          // c holds the sum of earlier steps
};

using Tile = void (*)(const TileArguments&);

template <class S, int R, int B>
struct Sums {
  static constexpr int kWidth = kBlock / S::kParts;
  typename S::Part at[R][B][S::kParts];

  XK_INLINE void load(const TileArguments& a) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p)
          at[r][b][p] =
              a.resume ? S::load(a.c + r * a.c_stride + b * kBlock + p * kWidth) : S::zero();
  }

  XK_INLINE void store(const TileArguments& a) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p)
          S::store(a.c + r * a.c_stride + b * kBlock + p * kWidth, at[r][b][p]);
  }

  // One unit of x against its weights.
  XK_INLINE void add(const typename S::Part (&wide)[B][S::kParts], const uint32_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto xr = S::spread(x + r * kLine);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < S::kParts; ++p) S::mac(at[r][b][p], wide[b][p], xr);
    }
  }

  // Step `s` from where w, fetched and x stand.
  XK_INLINE void step(const char* const (&w)[B], const char* const (&fetched)[B], int s,
                      const uint32_t* x) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) __builtin_prefetch(fetched[b] + s * kStepBytes, 0, 2);
    typename S::Part wide[B][S::kParts];
    if constexpr (B == S::kHeldBlocks) {
      typename S::Held held[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) held[b] = S::hold(w[b] + s * kStepBytes);
#pragma GCC unroll 8
      for (int u = 0; u < S::kUnits; ++u) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) wide[b][0] = S::expand(held[b], u);
        add(wide, x + s * S::kUnits + u);
      }
    } else {
#pragma GCC unroll 8
      for (int u = 0; u < S::kUnits; ++u) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
          for (int p = 0; p < S::kParts; ++p)
            wide[b][p] = S::weight(w[b] + s * kStepBytes, u, p);
        add(wide, x + s * S::kUnits + u);
      }
    }
  }
};

template <class S, int R, int B>
void tile(const TileArguments& a) {
  constexpr int kSteps = kLine / S::kUnits;  // steps of a line
  constexpr int kHalf = kSteps / 2 * kStepBytes;
  Sums<S, R, B> sums;
  sums.load(a);
  const uint32_t* x = a.x;
  const char* w[B];
  const char* fetched[B];
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) w[b] = a.weights[b], fetched[b] = w[b] + a.ahead;
  int step = 0;
  for (const int end : {a.switch_step, a.steps}) {
    // Whole lines are unrolled by halves: with addresses as constants little but the products is
    // left.
    for (; step + kSteps <= end; step += kSteps) {
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
        for (int s = 0; s < kSteps / 2; ++s) sums.step(w, fetched, s, x);
        x += kLine / 2;
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) w[b] += kHalf, fetched[b] += kHalf;
      }
      x += (R - 1) * kLine;
    }
    if (end < a.steps)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) fetched[b] = a.next[b];
  }
  for (int s = 0; step < a.steps; ++s, ++step) {
    sums.step(w, fetched, 0, x + s * S::kUnits);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) w[b] += kStepBytes, fetched[b] += kStepBytes;
  }
  sums.store(a);
}

// Blocks of the tile of `rows` rows: as many as leave the sums in registers.
template <class S>
constexpr int tile_blocks(int rows) {
  return rows <= S::kRows4 ? 4 : rows <= S::kRows2 ? 2 : 1;
}

template <class S, int... R>
Tile choose_tile(int rows, std::integer_sequence<int, R...>) {
  static constexpr Tile kTiles[] = {tile<S, R + 1, tile_blocks<S>(R + 1)>...};
  return kTiles[rows - 1];
}

template <class S>
Tile tile_of(int rows) {
  return choose_tile<S>(rows, std::make_integer_sequence<int, S::kRows1>());
}

}  // namespace
}  // namespace xk
