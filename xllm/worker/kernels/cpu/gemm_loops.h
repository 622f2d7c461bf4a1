// The loops around the register tile: lays x out in lines, shares the blocks out among the threads
// and walks them. Included behind a variant's target pragma; local to the including file.
//
// A few rows (one tile) read the weights straight through. More rows take the weights in panels
// that stay in the cache while all tiles of a stretch of rows pass over them; a source Few that is
// dear to expand may be widened once a panel, to the form that Many reads. Both give the same
// bits: a further panel of k continues from the stored fp32 sums. <type_traits> and <utility> stand
// before the pragma.
#pragma once

#include "gemm_epilogue.h"
#include "gemm_tile.h"
#include "gemm_variants.h"

namespace xk {
namespace {

constexpr int kPanelBlocks = 2;
constexpr int kPanelUnits = 512;       // units of k of a panel
constexpr int kClaimBlocks = 8;        // of a claim of several panels
constexpr int kSumStride = kClaimBlocks * kBlock;
constexpr int kStretchRows = 128;      // about the rows that share one panel
constexpr int kMaxTileRows = 16;
constexpr int kAhead = 4096;           // bytes of a block prefetched ahead
constexpr int kClaimBytes = 96 << 10;  // least weight bytes of a claim at few rows

struct Buffers {
  alignas(64) float sums[(kStretchRows + kMaxTileRows) * kSumStride];
  alignas(64) char panel[kPanelBlocks][kPanelUnits * kBlock * 4];
};

inline Buffers& own_buffers() {
  static thread_local Buffers buffers;
  return buffers;
}

// Tiles of nearly equal height, at most `most` rows.
struct Tiling {
  int64_t rows, count;
  Tiling(int64_t rows, int most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t start(int64_t tile) const { return rows * tile / count; }
};

struct Job {
  Team& team;
  const Weight& weight;
  Epilogue epilogue;
  int64_t blocks;
  int32_t steps;      // of the weights' form
  int32_t lines;      // of a row of x
  const uint32_t* x;  // [tile][line][rows of the tile][16]
  float* y;
  int64_t ldy;

  // Beyond the last block the last one is read again, its sums dropped.
  const char* block(int64_t b) const {
    b = b < blocks ? b : blocks - 1;
    return static_cast<const char*>(weight.data) + b * steps * kStepBytes;
  }
};

template <class S>
void few_rows(const Job& job, int rows) {
  const int per_tile = tile_blocks<S>(rows);
  const int per_group = per_tile < 2 ? 2 : per_tile;
  const int64_t fair = job.blocks / (job.team.size() * 4);
  int64_t per_claim = kClaimBytes / (static_cast<int64_t>(job.steps) * kStepBytes) + 1;
  per_claim = per_claim < fair ? per_claim : fair;
  per_claim = per_claim < per_group ? per_group : (per_claim + per_group - 1) / per_group * per_group;
  const Tile run = tile_of<S>(rows);

  TileArguments a;
  a.x = job.x;
  a.c_stride = per_group * kBlock;
  a.steps = job.steps;
  a.ahead = kAhead;
  a.switch_step = job.steps - kAhead / kStepBytes;
  a.switch_step = a.switch_step < 0 ? 0 : a.switch_step / kLine * kLine;
  a.resume = false;
  float* sums = own_buffers().sums;

  int64_t claim = job.team.claim() * per_claim;
  while (claim < job.blocks) {
    const int64_t next_claim = job.team.claim() * per_claim;
    const int64_t end = claim + per_claim < job.blocks ? claim + per_claim : job.blocks;
    for (int64_t group = claim; group < end; group += per_group) {
      for (int t = 0; t < per_group; t += per_tile) {
        const int64_t first = group + t;
        const int64_t next = first + per_tile < end ? first + per_tile : next_claim;
        for (int b = 0; b < per_tile; ++b) {
          a.weights[b] = job.block(first + b);
          a.next[b] = job.block(next + b);
        }
        a.c = sums + t * kBlock;
        run(a);
      }
      const int count = static_cast<int>(end - group < per_group ? end - group : per_group);
      store_sums(job.weight, job.epilogue, group, count, sums, a.c_stride, rows, job.y, job.ldy);
    }
    job.team.tick();
    claim = next_claim;
  }
}

// A panel of k, as the tiles read it, and what follows it in memory.
struct Panel {
  const char* at[kPanelBlocks];
  const char* next[kPanelBlocks];
  int32_t step, steps;  // in steps of Many
};

// The tiles [first, last) of x over one panel.
template <class S>
void walk_tiles(const Job& job, const Tiling& tiling, int64_t first, int64_t last,
                const Panel& panel, float* sums) {
  TileArguments a;
  a.c_stride = kSumStride;
  a.steps = panel.steps;
  a.ahead = 512;
  a.resume = panel.step > 0;
  // The first tiles fetch the next panel, a block each: memory is to be busy as long as can be.
  const int64_t fetching = last - first < kPanelBlocks ? last - first : kPanelBlocks;
  for (int64_t t = first; t < last; ++t) {
    const int64_t start = tiling.start(t);
    const int rows = static_cast<int>(tiling.start(t + 1) - start);
    const int per_tile = tile_blocks<S>(rows);
    const Tile run = tile_of<S>(rows);
    const int64_t line = panel.step * S::kUnits / kLine;
    a.x = job.x + (start * job.lines + line * rows) * kLine;
    for (int b = 0; b < kPanelBlocks; b += per_tile) {
      a.switch_step = panel.steps;
      for (int i = 0; i < per_tile; ++i) {
        const bool fetches = (b + i) % fetching == t - first;
        a.weights[i] = panel.at[b + i];
        a.next[i] = fetches ? panel.next[b + i] : panel.at[b + i];
        if (fetches) a.switch_step = 0;
      }
      a.c = sums + (start - tiling.start(first)) * a.c_stride + b * kBlock;
      run(a);
    }
  }
}

// Rows of a stretch and blocks of a claim: where rows are many, a claim has several panels, so that
// each piece of x is brought to the cache once for all of them.
struct Share {
  int64_t num_stretches, blocks, num_columns, num_claims;
  Share(const Job& job, int64_t rows)
      : num_stretches((rows + kStretchRows - 1) / kStretchRows),
        blocks(num_stretches > 1 ? kClaimBlocks : kPanelBlocks),
        num_columns((job.blocks + blocks - 1) / blocks),
        num_claims(num_stretches * num_columns) {}
};

// The panel of `steps` steps from `step` on of two blocks, of the weights' form; `next_block` and
// `next_step` are what comes behind it.
template <class Few, class Many>
Panel read_panel(const Job& job, int64_t block, int32_t step, int32_t steps, int64_t next_block,
                 int32_t next_step) {
  constexpr int kGrow = Few::kUnits / Many::kUnits;
  Panel panel;
  panel.step = step * kGrow;
  panel.steps = steps * kGrow;
  for (int b = 0; b < kPanelBlocks; ++b) {
    panel.at[b] = job.block(block + b) + static_cast<int64_t>(step) * kStepBytes;
    panel.next[b] = job.block(next_block + b) + static_cast<int64_t>(next_step) * kStepBytes;
    if constexpr (!std::is_same_v<Few, Many>) {
      char* wide = own_buffers().panel[b];
      Few::widen(panel.at[b], steps, wide);
      panel.at[b] = wide;
    }
  }
  return panel;
}

template <class Few, class Many>
void many_rows(const Job& job, const Tiling& tiling) {
  constexpr int kUnitSteps = kPanelUnits / Few::kUnits;  // steps of a panel, of the weights' form
  const Share share(job, tiling.rows);
  float* sums = own_buffers().sums;
  int64_t claim = job.team.claim();
  while (claim < share.num_claims) {
    const int64_t next_claim = job.team.claim();
    const int64_t stretch = claim / share.num_columns;
    const int64_t first = tiling.count * stretch / share.num_stretches;
    const int64_t last = tiling.count * (stretch + 1) / share.num_stretches;
    const int64_t begin = claim % share.num_columns * share.blocks;
    const int64_t end = begin + share.blocks < job.blocks ? begin + share.blocks : job.blocks;
    const int64_t after = next_claim % share.num_columns * share.blocks;
    for (int32_t step = 0; step < job.steps; step += kUnitSteps) {
      const int32_t left = job.steps - step;
      const int32_t steps = left < kUnitSteps ? left : kUnitSteps;
      const bool more = steps < left;
      for (int64_t block = begin; block < end; block += kPanelBlocks) {
        const bool is_last = block + kPanelBlocks >= end;
        const int64_t next = !is_last ? block + kPanelBlocks : more ? begin : after;
        const int32_t next_step = !is_last ? step : more ? step + steps : 0;
        const Panel panel = read_panel<Few, Many>(job, block, step, steps, next, next_step);
        walk_tiles<Many>(job, tiling, first, last, panel, sums + (block - begin) * kBlock);
      }
    }
    const int64_t row = tiling.start(first);
    store_sums(job.weight, job.epilogue, begin, static_cast<int>(end - begin), sums, kSumStride,
               static_cast<int>(tiling.start(last) - row), job.y + row * job.ldy, job.ldy);
    job.team.tick();
    claim = next_claim;
  }
}

// Rows of x to lines, by the thread's share of the rows. X::line(from, count, to) lays out the
// units of one line from `count` inputs, zeros behind them.
template <class X>
void lay_out(const Tiling& tiling, int thread, int threads, const float* x, int64_t ldx, int32_t k,
             int32_t lines, uint32_t* to) {
  const int64_t end = tiling.rows * (thread + 1) / threads;
  for (int64_t r = tiling.rows * thread / threads; r < end; ++r) {
    int64_t tile = r * tiling.count / tiling.rows;
    while (tiling.start(tile + 1) <= r) ++tile;
    const int64_t start = tiling.start(tile), height = tiling.start(tile + 1) - start;
    uint32_t* out = to + (start * lines + r - start) * kLine;
    for (int32_t line = 0; line < lines; ++line) {
      const int32_t left = k - line * X::kInputs;
      X::line(x + r * ldx + static_cast<int64_t>(line) * X::kInputs,
              left < X::kInputs ? left : X::kInputs, out + line * height * kLine);
    }
  }
}

struct FloatLines {
  static constexpr int kInputs = 16;
  static void line(const float* from, int count, uint32_t* to) {
    if (count == kInputs) {
      __builtin_memcpy(to, from, 64);
    } else {
      __builtin_memset(to, 0, 64);
      __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    }
  }
};

struct Bf16Lines {
  static constexpr int kInputs = 32;
  // Rounds to nearest, ties to even; NaN stays one.
  static uint32_t narrow(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  }
  static void line(const float* from, int count, uint32_t* to) {
    alignas(64) float padded[kInputs];
    for (int i = 0; i < kInputs; ++i) padded[i] = 0.0f;
    __builtin_memcpy(padded, from, static_cast<size_t>(count) * 4);
    for (int i = 0; i < kLine; ++i)
      to[i] = narrow(padded[2 * i]) | narrow(padded[2 * i + 1]) << 16;
  }
};

struct Call {
  Team& team;
  int thread;
  const Weight& weight;
  const float* x;
  int64_t ldx;
  int32_t rows;
  float* y;
  int64_t ldy;
  Epilogue epilogue;
  void* scratch;
};

// The product of one kind of weights: Few and Many read them, X is how x is laid out for both.
template <class Few, class Many, class X>
void product(const Call& call) {
  constexpr int kInputs = X::kInputs / kLine;  // of a unit
  const int32_t k = call.weight.k, rows = call.rows;
  const int32_t units = (k + kInputs - 1) / kInputs;
  const Tiling tiling(rows, rows <= Few::kRows1 ? Few::kRows1 : Many::kRows1);
  Job job{call.team,
          call.weight,
          call.epilogue,
          num_blocks(call.weight, call.epilogue),
          (units + Few::kUnits - 1) / Few::kUnits,
          (units + kLine - 1) / kLine,
          static_cast<const uint32_t*>(call.scratch),
          call.y,
          call.ldy};
  if (std::is_same_v<X, FloatLines> && rows == 1 && k % kLine == 0) {
    job.x = reinterpret_cast<const uint32_t*>(call.x);  // is in lines as it is
  } else if (rows > 0) {
    lay_out<X>(tiling, call.thread, call.team.size(), call.x, call.ldx, k, job.lines,
               static_cast<uint32_t*>(call.scratch));
    call.team.barrier();
  }
  if (rows > 0 && tiling.count == 1)
    few_rows<Few>(job, rows);
  else if (rows > 0)
    many_rows<Few, Many>(job, tiling);
  call.team.barrier();
}

}  // namespace
}  // namespace xk
