#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace xk {
namespace {

struct ThreadScratch {
  Tile tile;
  PartitionScratch partition;
  Partial partial;
  Partial state;
};

constexpr int64_t kThreadBytes = (sizeof(ThreadScratch) + 63) / 64 * 64;

// How the work of a call is cut; every thread comes to the same one.
struct Cut {
  int32_t group;      // heads that share a KV head
  int32_t width;      // head_dim up to a multiple of 16
  int32_t num_parts;  // pieces of a context that are attended apart; 1: none
};

// One work item: queries [first, first + count) of a sequence and KV head, where query i is row
// i / group and head i % group, over partitions [first_part, last_part).
struct Item {
  const Sequence* sequence;
  int32_t kv_head;
  int32_t first;
  int32_t count;
  int32_t first_part;
  int32_t last_part;
};

int32_t num_tiles(const Sequence& sequence, const Cut& cut) {
  return static_cast<int32_t>(
      (static_cast<int64_t>(sequence.num_rows) * cut.group + kTileRows - 1) / kTileRows);
}

int32_t lowest_token(const AttentionShape& shape, int32_t position) {
  return shape.window > 0 ? std::max(position - shape.window + 1, 0) : 0;
}

// The partitions that queries from position `first` to `last` see.
void see(const AttentionShape& shape, int32_t first, int32_t last, Item& item) {
  item.first_part = lowest_token(shape, first) / kPartition;
  item.last_part = last / kPartition + 1;
}

int32_t num_partitions(const AttentionShape& shape, const Sequence& sequence) {
  Item whole{};
  see(shape, sequence.start, sequence.start + sequence.num_rows - 1, whole);
  return whole.last_part - whole.first_part;
}

// Contexts are cut only where there is too little to do for the threads otherwise.
Cut choose_cut(const KvLayout& layout, const AttentionShape& shape, const Sequence* sequences,
               int32_t count, int32_t num_threads) {
  Cut cut{shape.num_heads / layout.num_kv_heads, (layout.head_dim + 15) / 16 * 16, 1};
  int64_t num_items = 0;
  for (int32_t s = 0; s < count; ++s)
    num_items += static_cast<int64_t>(num_tiles(sequences[s], cut)) * layout.num_kv_heads;
  const int64_t wanted = 4 * static_cast<int64_t>(num_threads);
  if (num_threads > 1 && num_items > 0 && num_items < wanted)
    cut.num_parts = static_cast<int32_t>((wanted + num_items - 1) / num_items);
  return cut;
}

// Pieces of this sequence's context; those of more than one tile stay whole.
int32_t parts_of(const AttentionShape& shape, const Sequence& sequence, const Cut& cut) {
  if (cut.num_parts == 1 || num_tiles(sequence, cut) > 1) return 1;
  return std::min(cut.num_parts, num_partitions(shape, sequence));
}

int64_t partial_floats(const Sequence& sequence, const Cut& cut) {
  return static_cast<int64_t>(sequence.num_rows) * cut.group * (cut.width + 2);
}

int64_t stored_floats(const KvLayout& layout, const AttentionShape& shape,
                      const Sequence& sequence, const Cut& cut) {
  if (parts_of(shape, sequence, cut) == 1) return 0;
  return partial_floats(sequence, cut) * num_partitions(shape, sequence) * layout.num_kv_heads;
}

// One thread's share of a call.
class Worker {
 public:
  Worker(Team& team, int thread, const AttentionKernels& kernels, const KvLayout& layout,
         const AttentionShape& shape, int64_t layer_offset, float* q, char* scratch)
      : team_(team),
        kernels_(kernels),
        layout_(layout),
        shape_(shape),
        layer_offset_(layer_offset),
        q_(q),
        own_(*new (scratch + thread * kThreadBytes) ThreadScratch),
        stored_(reinterpret_cast<float*>(scratch + team.size() * kThreadBytes)) {}

  void run(const Sequence* sequences, int32_t count) {
    cut_ = choose_cut(layout_, shape_, sequences, count, team_.size());
    attend_items(sequences, count);
    team_.barrier();
    if (cut_.num_parts == 1) return;
    merge_items(sequences, count);
    team_.barrier();
  }

 private:
  void attend_items(const Sequence* sequences, int32_t count) {
    int64_t item = team_.claim(), first = 0;
    float* stored = stored_;
    for (int32_t s = 0; s < count; ++s) {
      const Sequence& sequence = sequences[s];
      const int32_t tiles = num_tiles(sequence, cut_), parts = parts_of(shape_, sequence, cut_);
      const int64_t each = parts > 1 ? parts : tiles;
      for (; item < first + each * layout_.num_kv_heads; item = team_.claim()) {
        const auto head = static_cast<int32_t>((item - first) / each);
        const auto number = static_cast<int32_t>((item - first) % each);
        if (parts > 1)
          attend_part(sequence, head, number, parts, stored);
        else
          attend_tile(sequence, head, tiles - 1 - number);  // the longest first
        team_.tick();
      }
      first += each * layout_.num_kv_heads;
      stored += stored_floats(layout_, shape_, sequence, cut_);
    }
  }

  void merge_items(const Sequence* sequences, int32_t count) {
    int64_t item = team_.claim(), first = 0;
    const float* stored = stored_;
    for (int32_t s = 0; s < count; ++s) {
      const Sequence& sequence = sequences[s];
      if (parts_of(shape_, sequence, cut_) > 1) {
        for (; item < first + layout_.num_kv_heads; item = team_.claim())
          merge_head(sequence, static_cast<int32_t>(item - first), stored);
        first += layout_.num_kv_heads;
      }
      stored += stored_floats(layout_, shape_, sequence, cut_);
    }
  }

  Item tile_item(const Sequence& sequence, int32_t head, int32_t tile) const {
    Item item{&sequence, head, tile * kTileRows, 0, 0, 0};
    item.count = std::min(kTileRows, sequence.num_rows * cut_.group - item.first);
    see(shape_, sequence.start + item.first / cut_.group,
        sequence.start + (item.first + item.count - 1) / cut_.group, item);
    return item;
  }

  float* query_of(const Item& item, int32_t m) const {
    const int32_t row = (item.first + m) / cut_.group, head = (item.first + m) % cut_.group;
    const int64_t at = static_cast<int64_t>(item.sequence->first_row + row) * shape_.num_heads;
    return q_ + (at + item.kv_head * cut_.group + head) * layout_.head_dim;
  }

  // Takes the queries of an item into the tile, scaled.
  void prepare(const Item& item) {
    Tile& tile = own_.tile;
    tile.num_rows = item.count;
    tile.padded_rows = 1;
    while (tile.padded_rows < item.count) tile.padded_rows *= 2;
    tile.head_dim = layout_.head_dim;
    tile.softcap = shape_.softcap;
    for (int32_t m = item.count; m < tile.padded_rows; ++m)
      std::fill_n(tile.query + m * kQueryStride, layout_.head_dim, 0.0f);
    for (int32_t m = 0; m < item.count; ++m) {
      const int32_t position = item.sequence->start + (item.first + m) / cut_.group;
      tile.low[m] = lowest_token(shape_, position);
      tile.high[m] = position + 1;
      const float* query = query_of(item, m);
      for (int32_t d = 0; d < layout_.head_dim; ++d)
        tile.query[m * kQueryStride + d] = query[d] * shape_.scale;
    }
    std::fill(own_.state.top, own_.state.top + kTileRows, -INFINITY);
    std::fill(own_.state.sum, own_.state.sum + kTileRows, 0.0f);
    std::fill(own_.state.values, own_.state.values + item.count * cut_.width, 0.0f);
  }

  // Where the tokens of a partition lie, as far as the item's queries see them.
  Runs find_runs(const Item& item, int32_t part) const {
    Runs runs{};
    const Tile& tile = own_.tile;
    const int32_t size = layout_.block_size, dim = layout_.head_dim;
    const int32_t begin = std::max(tile.low[0] / kRun * kRun, part * kPartition);
    const int32_t end = std::min(tile.high[item.count - 1], (part + 1) * kPartition);
    const int64_t item_bytes = layout_.kind == kKvBf16 ? 2 : layout_.kind == kKvInt8 ? 1 : 4;
    const int64_t head_bytes = static_cast<int64_t>(size) * dim * item_bytes;
    const int64_t keys = layer_offset_ + item.kv_head * head_bytes;
    const int64_t values = keys + layout_.num_kv_heads * head_bytes;
    const int64_t scales = layer_offset_ + 2 * layout_.num_kv_heads * head_bytes;
    for (int32_t token = begin; token < end; token += kRun) {
      const int32_t number = token / size;
      const int64_t block = item.sequence->table ? item.sequence->table[number] : number;
      const int64_t inside = static_cast<int64_t>(token % size) * dim * item_bytes;
      const char* at = item.sequence->base + block * layout_.block_bytes + inside;
      runs.keys[token % kPartition / kRun] = at + keys;
      runs.values[token % kPartition / kRun] = at + values;
      if (layout_.kind != kKvInt8) continue;
      const auto* own = reinterpret_cast<const float*>(at - inside + scales);
      own += int64_t{item.kv_head} * size + token % size;
      runs.key_scales[token % kPartition / kRun] = own;
      runs.value_scales[token % kPartition / kRun] = own + int64_t{layout_.num_kv_heads} * size;
    }
    return runs;
  }

  void attend_one(const Item& item, int32_t part) {
    const Runs runs = find_runs(item, part);
    kernels_.partition[layout_.kind](own_.tile, runs, part * kPartition, layout_.head_dim,
                                     own_.partition, own_.partial);
  }

  void finish(const Item& item) {
    for (int32_t m = 0; m < item.count; ++m)
      kernels_.finish(own_.tile, own_.state, m, query_of(item, m));
  }

  void attend_tile(const Sequence& sequence, int32_t head, int32_t number) {
    const Item item = tile_item(sequence, head, number);
    prepare(item);
    for (int32_t part = item.first_part; part < item.last_part; ++part) {
      attend_one(item, part);
      kernels_.merge(own_.tile, own_.partial, own_.state);
    }
    finish(item);
  }

  // The stored form of a partition: tops, sums, values of the item's queries.
  void attend_part(const Sequence& sequence, int32_t head, int32_t number, int32_t parts,
                   float* stored) {
    const Item item = tile_item(sequence, head, 0);
    const int64_t floats = partial_floats(sequence, cut_);
    const int32_t total = item.last_part - item.first_part;
    prepare(item);
    for (int64_t at = int64_t{number} * total / parts; at < int64_t{number + 1} * total / parts;
         ++at) {
      attend_one(item, item.first_part + static_cast<int32_t>(at));
      float* to = stored + (int64_t{head} * total + at) * floats;
      to = std::copy_n(own_.partial.top, item.count, to);
      to = std::copy_n(own_.partial.sum, item.count, to);
      std::copy_n(own_.partial.values, item.count * cut_.width, to);
    }
  }

  void merge_head(const Sequence& sequence, int32_t head, const float* stored) {
    const Item item = tile_item(sequence, head, 0);
    const int64_t floats = partial_floats(sequence, cut_);
    const int32_t total = item.last_part - item.first_part;
    prepare(item);
    for (int32_t at = 0; at < total; ++at) {
      const float* from = stored + (int64_t{head} * total + at) * floats;
      std::copy_n(from, item.count, own_.partial.top);
      std::copy_n(from + item.count, item.count, own_.partial.sum);
      std::copy_n(from + 2 * item.count, item.count * cut_.width, own_.partial.values);
      kernels_.merge(own_.tile, own_.partial, own_.state);
    }
    finish(item);
  }

  Team& team_;
  const AttentionKernels& kernels_;
  const KvLayout& layout_;
  const AttentionShape& shape_;
  const int64_t layer_offset_;
  float* const q_;
  ThreadScratch& own_;
  float* const stored_;
  Cut cut_{};
};

}  // namespace

int64_t attention_scratch_bytes(const KvLayout& layout, const AttentionShape& shape,
                                const Sequence* sequences, int32_t count, int32_t num_threads) {
  const Cut cut = choose_cut(layout, shape, sequences, count, num_threads);
  int64_t floats = 0;
  for (int32_t s = 0; s < count; ++s) floats += stored_floats(layout, shape, sequences[s], cut);
  return num_threads * kThreadBytes + floats * static_cast<int64_t>(sizeof(float));
}

void attend(Team& team, int thread, const AttentionKernels& kernels, const KvLayout& layout,
            const AttentionShape& shape, int64_t layer_offset, const Sequence* sequences,
            int32_t count, float* q, char* scratch) {
  Worker worker(team, thread, kernels, layout, shape, layer_offset, q, scratch);
  worker.run(sequences, count);
}

}  // namespace xk
