// Attention of all sequences of a step over KV in blocks: decodes, prompts, chunks with a prefix.
//
// A work item is a KV head and up to 16 of the queries that share it (rows of a sequence times
// heads of the group), over the context that they see. The context is cut into partitions of 256
// tokens, counted from position 0; each is attended on its own and merged into the result in
// order. Sequences whose first partitions are the same memory can be one item: such a partition
// is read once for the queries of all. Invariant: a row's bits depend on its query and its own
// context alone, not on the sequences, rows and heads beside it, on how its prompt was cut, on
// where the blocks lie or on the threads.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "team.h"

namespace xk {

constexpr int kRun = 16;          // tokens whose keys lie transposed side by side
constexpr int kPartition = 256;   // tokens that share one softmax before they are merged
constexpr int kPartitionRuns = kPartition / kRun;
constexpr int kScoreStride = kPartition + kRun;  // of the scores: a power of two would share cache sets
constexpr int kTileRows = 16;     // queries of one work item at most
constexpr int kMaxHeadDim = 512;
constexpr int kQueryStride = kMaxHeadDim + 16;  // as kScoreStride

enum KvKind : int32_t { kKvBf16 = 0, kKvFp32 = 1, kKvInt8 = 2 };
constexpr int kNumKvKinds = 3;

// Where the KV of a step lies. A block holds all layers; in a layer its keys come first, per KV
// head [block_size / 16][head_dim][16], then its values, per KV head [block_size][head_dim]. Of
// kKvInt8 then floats: what each token's keys are multiplied by, [kv_head][block_size], and values.
struct KvLayout {
  int32_t kind;
  int32_t block_size;  // a power of two, at least 16
  int32_t num_kv_heads;
  int32_t head_dim;
  int64_t block_bytes;
  int64_t layer_bytes;
};

// Rows [first_row, first_row + num_rows) of the step stand at positions from `start` on. Block b
// is at base + (table ? table[b] : b) * block_bytes.
struct Sequence {
  int32_t first_row;
  int32_t num_rows;
  int32_t start;
  int32_t shares;  // 1: stands in Sharing::order
  char* base;
  const int64_t* table;
};

// Sequences that have memory in common with their neighbours in `order` (numbers of sequences):
// the first common[i] partitions of order[i] are those of order[i - 1], and lie before the rows
// of both; common[0] is 0.
struct Sharing {
  const int32_t* order;
  const int32_t* common;
  int32_t count;
};

struct AttentionShape {
  int32_t num_heads;
  int32_t window;   // tokens that a row sees, itself included; 0: all
  float scale;
  float softcap;    // 0: none
};

// The queries of one work item and their results, per variant and kind: see attention_tile.h.
struct Tile {
  int32_t num_rows;             // queries
  int32_t padded_rows;          // as the kernels count them: 1, 2, 4, 8 or 16
  int32_t head_dim;
  float softcap;
  int32_t low[kTileRows];       // tokens [low, high) are seen
  int32_t high[kTileRows];
  alignas(64) float query[kTileRows * kQueryStride];  // [query][head_dim], scaled
};

// What attending one partition gives: sums of exponentials below `top`, and of values under them.
struct Partial {
  float top[kTileRows];
  float sum[kTileRows];
  alignas(64) float values[kTileRows * kMaxHeadDim];  // [query][head_dim up to a multiple of 16]
};

struct Runs {
  const char* keys[kPartitionRuns];
  const char* values[kPartitionRuns];
  const float* key_scales[kPartitionRuns];    // of kKvInt8
  const float* value_scales[kPartitionRuns];
};

struct PartitionScratch {
  alignas(64) float scores[kTileRows * kScoreStride];  // [query][token]
};

struct AttentionKernels {
  // Attends the tokens from `first` on, whose memory is `runs`, where a query of the tile sees
  // any; `partial` is overwritten.
  void (*partition[kNumKvKinds])(const Tile& tile, const Runs& runs, int32_t first, int32_t value_stride,
                       PartitionScratch& scratch, Partial& partial);
  // Takes the next partition's result of the tile's queries into those of `state` from `at` on.
  void (*merge)(const Tile& tile, const Partial& partial, Partial& state, int32_t at);
  // Writes one query's result.
  void (*finish)(const Tile& tile, const Partial& state, int32_t query, float* out);
};

// Bytes of scratch that `attend` wants for these sequences.
int64_t attention_scratch_bytes(const KvLayout& layout, const AttentionShape& shape,
                                const Sequence* sequences, int32_t count, int32_t num_threads);

// Called by every thread of a run with the same arguments: q [rows, heads * head_dim] becomes the
// attention's result, in place. The keys and values of all rows stand already (`layer_offset`
// bytes into their blocks), behind a barrier. Ends with a barrier.
void attend(Team& team, int thread, const AttentionKernels& kernels, const KvLayout& layout,
            const AttentionShape& shape, int64_t layer_offset, const Sequence* sequences,
            int32_t count, const Sharing& sharing, float* q, char* scratch);

}  // namespace xk
