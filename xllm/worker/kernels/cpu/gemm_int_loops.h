// The loops around the tile of quantized products: rounds x, shares the blocks out and walks them.
// Included behind a variant's target pragma; local to the including file. <type_traits> and
// <utility> stand before the pragma.
//
// A few rows (one tile) read the weights straight through. More rows take panels of blocks and
// inputs that stay in the cache while all tiles of a stretch of rows pass over them; halves are
// widened to bytes once a panel. The groups of inputs are added in their order in both.
#pragma once

#include "gemm_epilogue.h"
#include "gemm_int_rows.h"
#include "gemm_variants.h"

namespace xk {
namespace {

constexpr int kIntPanelBlocks = 2;
constexpr int kIntPanelLines = 64;         // of inputs: the largest group
constexpr int kIntStretchRows = 128;       // about the rows that share one panel
constexpr int kIntMaxRows = 16;
constexpr int kIntAhead = 4096;            // bytes of a block prefetched ahead
constexpr int kIntClaimBytes = 96 << 10;   // least weight bytes of a claim at few rows

struct IntBuffers {
  alignas(64) float sums[(kIntStretchRows + kIntMaxRows) * kIntMaxBlocks * 16];
  alignas(64) char panel[kIntPanelBlocks][kIntPanelLines * Bytes::kLineBytes];
};

inline IntBuffers& own_int_buffers() {
  static thread_local IntBuffers buffers;
  return buffers;
}

struct IntTiling {  // tiles of nearly equal height
  int64_t rows, count;
  IntTiling(int64_t rows, int most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t start(int64_t tile) const { return rows * tile / count; }
};

struct IntJob {
  Team& team;
  const Weight& weight;
  Epilogue epilogue;
  int64_t blocks;
  int32_t lines, group_lines, groups;
  int32_t planes;
  uint32_t* x;           // [tile][line][rows of the tile][planes][16]
  RowGroup* row_groups;  // [tile][group][rows of the tile]
  float* y;
  int64_t ldy;

  // Beyond the last block the last one is read again, its sums dropped.
  int64_t known(int64_t b) const { return b < blocks ? b : blocks - 1; }
  const char* block(int64_t b) const {
    const int64_t bytes = static_cast<int64_t>(lines) * int_line_bytes(weight.kind);
    return static_cast<const char*>(weight.data) + known(b) * bytes;
  }
  const uint16_t* scales(int64_t b) const {
    if (weight.kind != kInt4) return nullptr;
    return reinterpret_cast<const uint16_t*>(weight.scales) + known(b) * groups * 16;
  }
  const uint32_t* x_at(int64_t start, int64_t height, int64_t line) const {
    return x + (start * lines + line * height) * planes * kIntUnits;
  }
  const RowGroup* groups_at(int64_t start, int64_t height, int64_t group) const {
    return row_groups + start * groups + group * height;
  }
};

template <class S, class W>
void few_int_rows(const IntJob& job, int rows) {
  const int per_tile = int_tile_blocks<S>(rows, kIntMaxBlocks);
  const int per_group = per_tile < 2 ? 2 : per_tile;
  const int64_t fair = job.blocks / (job.team.size() * 4);
  int64_t per_claim = kIntClaimBytes / (static_cast<int64_t>(job.lines) * W::kLineBytes) + 1;
  per_claim = per_claim < fair ? per_claim : fair;
  per_claim = per_claim < per_group ? per_group : (per_claim + per_group - 1) / per_group * per_group;
  const IntTile run = int_tile_of<S, W>(rows, per_tile);
  IntTileArguments a{};
  a.x = job.x;
  a.groups = job.row_groups;
  a.c_stride = per_group * 16;
  a.lines = job.lines;
  a.group_lines = job.group_lines;
  a.zero = W::kZero;
  a.ahead = kIntAhead;
  a.resume = false;
  float* sums = own_int_buffers().sums;
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
          a.scales[b] = job.scales(first + b);
        }
        a.c = sums + t * 16;
        run(a);
      }
      const int count = static_cast<int>(end - group < per_group ? end - group : per_group);
      store_sums(job.weight, job.epilogue, group, count, sums, a.c_stride, rows, job.y, job.ldy);
    }
    job.team.tick();
    claim = next_claim;
  }
}

// The tiles [first, last) of x over lines [line, line + count) of two blocks of bytes.
template <class S>
void walk_int_tiles(const IntJob& job, const IntTiling& tiling, int64_t first, int64_t last,
                    const char* (&panel)[kIntPanelBlocks], const char* (&next)[kIntPanelBlocks],
                    int64_t block, int32_t line, int32_t count, float* sums) {
  IntTileArguments a{};
  a.c_stride = kIntPanelBlocks * 16;
  a.lines = count;
  a.group_lines = job.group_lines;
  a.zero = job.weight.kind == kInt4 ? Halves::kZero : Bytes::kZero;
  a.resume = line > 0;
  const int32_t group = line / job.group_lines;
  for (int64_t t = first; t < last; ++t) {
    const int64_t start = tiling.start(t);
    const int rows = static_cast<int>(tiling.start(t + 1) - start);
    const int per_tile = int_tile_blocks<S>(rows, kIntPanelBlocks);
    const IntTile run = int_tile_of<S, Bytes>(rows, per_tile);
    a.x = job.x_at(start, rows, line);
    a.groups = job.groups_at(start, rows, group);
    // The first tile fetches the panel from memory, and the others what follows it.
    a.ahead = t == first ? 512 : count * Bytes::kLineBytes;
    for (int b = 0; b < kIntPanelBlocks; b += per_tile) {
      for (int i = 0; i < per_tile; ++i) {
        a.weights[i] = panel[b + i];
        a.next[i] = t == last - 1 ? next[b + i] : panel[b + i];
        a.scales[i] = job.scales(block + b + i);
        if (a.scales[i]) a.scales[i] += group * 16;
      }
      a.c = sums + (start - tiling.start(first)) * a.c_stride + b * 16;
      run(a);
    }
  }
}

// Halves to bytes.
inline void widen_halves(const char* from, int64_t lines, char* to) {
  for (int64_t step = 0; step < lines * 8; ++step, from += 64, to += 128) {
    for (int i = 0; i < 64; ++i) to[i] = static_cast<char>(from[i] & 15);
    for (int i = 0; i < 64; ++i) to[64 + i] = static_cast<char>(static_cast<uint8_t>(from[i]) >> 4);
  }
}

template <class S, class W>
void many_int_rows(const IntJob& job, const IntTiling& tiling) {
  IntBuffers& own = own_int_buffers();
  const int32_t panel_lines = kIntPanelLines / job.group_lines * job.group_lines;
  const int64_t num_stretches = (tiling.rows + kIntStretchRows - 1) / kIntStretchRows;
  const int64_t num_panels = (job.blocks + kIntPanelBlocks - 1) / kIntPanelBlocks;
  const int64_t num_claims = num_stretches * num_panels;
  for (int64_t claim = job.team.claim(); claim < num_claims; claim = job.team.claim()) {
    const int64_t first = tiling.count * (claim / num_panels) / num_stretches;
    const int64_t last = tiling.count * (claim / num_panels + 1) / num_stretches;
    const int64_t block = claim % num_panels * kIntPanelBlocks;
    for (int32_t line = 0; line < job.lines; line += panel_lines) {
      const int32_t count = job.lines - line < panel_lines ? job.lines - line : panel_lines;
      const char* panel[kIntPanelBlocks];
      const char* next[kIntPanelBlocks];
      for (int b = 0; b < kIntPanelBlocks; ++b) {
        panel[b] = job.block(block + b) + static_cast<int64_t>(line) * W::kLineBytes;
        const bool more = line + count < job.lines;
        next[b] = more ? panel[b] + int64_t{count} * W::kLineBytes
                       : job.block(block + b + kIntPanelBlocks);
        if constexpr (W::kUnits == 2) {
          widen_halves(panel[b], count, own.panel[b]);
          panel[b] = own.panel[b];
        }
      }
      walk_int_tiles<S>(job, tiling, first, last, panel, next, block, line, count, own.sums);
    }
    const int64_t row = tiling.start(first), left = job.blocks - block;
    store_sums(job.weight, job.epilogue, block,
               static_cast<int>(left < kIntPanelBlocks ? left : kIntPanelBlocks), own.sums,
               kIntPanelBlocks * 16, static_cast<int>(tiling.start(last) - row),
               job.y + row * job.ldy, job.ldy);
    job.team.tick();
  }
}

struct IntCall {
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

// This thread's share of the rows of x.
template <class X>
void quantize_rows(const IntCall& call, const IntJob& job, const IntTiling& tiling) {
  const int64_t threads = call.team.size(), end = tiling.rows * (call.thread + 1) / threads;
  for (int64_t r = tiling.rows * call.thread / threads; r < end; ++r) {
    int64_t tile = r * tiling.count / tiling.rows;
    while (tiling.start(tile + 1) <= r) ++tile;
    const int64_t start = tiling.start(tile), height = tiling.start(tile + 1) - start;
    uint32_t* lines = job.x + (start * job.lines + r - start) * X::kPlanes * kIntUnits;
    RowGroup* groups = job.row_groups + start * job.groups + r - start;
    quantize_row<X>(call.x + r * call.ldx, call.weight.k, call.weight.group, lines,
                    height * X::kPlanes * kIntUnits, groups, height);
  }
}

// The product by source S, with x as X has it, of weights W.
template <class S, class W, class X>
void int_product(const IntCall& call) {
  static_assert(S::kPlanes == X::kPlanes && int_tile_rows<S>() <= kIntMaxRows);
  const Weight& weight = call.weight;
  const auto lines = static_cast<int32_t>(int_lines(weight.k));
  const int32_t group_lines = weight.group / kIntLine;
  const IntTiling tiling(call.rows, int_tile_rows<S>());
  auto* x = static_cast<uint32_t*>(call.scratch);
  auto* groups =
      reinterpret_cast<RowGroup*>(x + int64_t{call.rows} * lines * X::kPlanes * kIntUnits);
  const IntJob job{call.team, weight, call.epilogue, num_blocks(weight, call.epilogue), lines,
                   group_lines, (lines + group_lines - 1) / group_lines, X::kPlanes, x, groups,
                   call.y, call.ldy};
  if (call.rows > 0) {
    quantize_rows<X>(call, job, tiling);
    call.team.barrier();
    if (tiling.count == 1)
      few_int_rows<S, W>(job, call.rows);
    else
      many_int_rows<S, W>(job, tiling);
  }
  call.team.barrier();
}

}  // namespace
}  // namespace xk
