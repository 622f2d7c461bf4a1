#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "attention_cut.h"

namespace xk {
namespace {

struct ThreadScratch {
  Tile tile;
  PartitionScratch partition;
  Partial partial;
  Partial state;
};

constexpr int64_t kThreadBytes = (sizeof(ThreadScratch) + 63) / 64 * 64;

// One thread's share of a call.
class Worker {
 public:
  Worker(Team& team, int thread, const AttentionKernels& kernels, const KvLayout& layout,
         const AttentionShape& shape, int64_t layer_offset, const Sequence* sequences,
         int32_t count, const Sharing& sharing, float* q, char* scratch)
      : team_(team),
        kernels_(kernels),
        layout_(layout),
        shape_(shape),
        layer_offset_(layer_offset),
        sequences_(sequences),
        count_(count),
        sharing_(sharing),
        q_(q),
        own_(*new (scratch + thread * kThreadBytes) ThreadScratch),
        stored_(reinterpret_cast<float*>(scratch + team.size() * kThreadBytes)),
        cut_(choose_cut(layout, shape, sequences, count, sharing, team.size())) {}

  void run() {
    attend_items();
    team_.barrier();
    if (cut_.num_parts == 1) return;
    merge_items();
    team_.barrier();
  }

 private:
  // The numbers from `first` on that this thread claims, of the next `count` of a phase.
  struct Claims {
    Team& team;
    int64_t item;
    int64_t first = 0;

    template <class F>
    void take(int64_t count, const F& work) {
      for (; item < first + count; item = team.claim()) {
        work(static_cast<int32_t>(item - first));
        team.tick();
      }
      first += count;
    }
  };

  void attend_items() {
    Claims claims{team_, team_.claim()};
    const bool bundles = cut_.bundle_queries > 0;
    if (bundles) attend_bundles(claims);
    float* stored = stored_;
    for (int32_t s = 0; s < count_; ++s) {
      const Sequence& sequence = sequences_[s];
      const int32_t parts = parts_of(shape_, sequence, cut_);
      if (parts > 1)
        claims.take(int64_t{parts} * layout_.num_kv_heads, [&](int32_t number) {
          attend_part(sequence, number / parts, number % parts, parts, stored);
        });
      else if (!(bundles && sequence.shares))
        attend_sequence(claims, sequence);
      stored += stored_floats(layout_, shape_, sequence, cut_);
    }
  }

  // The sequences that share memory, which take longer than others.
  void attend_bundles(Claims& claims) {
    for (int32_t first = 0, end = 0; first < sharing_.count; first = end) {
      end = bundle_end(cut_, sequences_, sharing_, first);
      if (end == first + 1)
        attend_sequence(claims, sequences_[sharing_.order[first]]);
      else
        claims.take(layout_.num_kv_heads, [&](int32_t head) {
          attend_together(make_bundle(shape_, cut_, sequences_, sharing_, first, end, head));
        });
    }
  }

  void attend_sequence(Claims& claims, const Sequence& sequence) {
    const int32_t tiles = num_tiles(sequence, cut_);
    claims.take(int64_t{tiles} * layout_.num_kv_heads, [&](int32_t number) {
      const int32_t tile = tiles - 1 - number % tiles;  // the longest first
      attend_together({1, {tile_item(shape_, cut_, sequence, number / tiles, tile)}, {0}});
    });
  }

  void merge_items() {
    Claims claims{team_, team_.claim()};
    const float* stored = stored_;
    for (int32_t s = 0; s < count_; ++s) {
      const Sequence& sequence = sequences_[s];
      if (parts_of(shape_, sequence, cut_) > 1)
        claims.take(layout_.num_kv_heads,
                    [&](int32_t head) { merge_head(sequence, head, stored); });
      stored += stored_floats(layout_, shape_, sequence, cut_);
    }
  }

  float* query_of(const Item& item, int32_t m) const {
    const int32_t row = (item.first + m) / cut_.group, head = (item.first + m) % cut_.group;
    const int64_t at = static_cast<int64_t>(item.sequence->first_row + row) * shape_.num_heads;
    return q_ + (at + item.kv_head * cut_.group + head) * layout_.head_dim;
  }

  // Takes the queries of items into the tile, scaled.
  void load(const Item* items, int32_t count) {
    Tile& tile = own_.tile;
    tile.head_dim = layout_.head_dim;
    tile.softcap = shape_.softcap;
    int32_t at = 0;
    for (const Item* item = items; item < items + count; ++item)
      for (int32_t m = 0; m < item->count; ++m, ++at) {
        const int32_t position = item->sequence->start + (item->first + m) / cut_.group;
        tile.low[at] = lowest_token(shape_, position);
        tile.high[at] = position + 1;
        const float* query = query_of(*item, m);
        for (int32_t d = 0; d < layout_.head_dim; ++d)
          tile.query[at * kQueryStride + d] = query[d] * shape_.scale;
      }
    tile.num_rows = at;
    tile.padded_rows = 1;
    while (tile.padded_rows < at) tile.padded_rows *= 2;
    for (; at < tile.padded_rows; ++at)
      std::fill_n(tile.query + at * kQueryStride, layout_.head_dim, 0.0f);
  }

  void clear_state(int32_t num_queries) {
    std::fill(own_.state.top, own_.state.top + num_queries, -INFINITY);
    std::fill(own_.state.sum, own_.state.sum + num_queries, 0.0f);
    std::fill(own_.state.values, own_.state.values + num_queries * cut_.width, 0.0f);
  }

  // Where the tokens of a partition lie, as far as the tile's queries see them.
  Runs find_runs(const Item& item, int32_t part) const {
    Runs runs{};
    const Tile& tile = own_.tile;
    const int32_t size = layout_.block_size, dim = layout_.head_dim;
    const int32_t low = *std::min_element(tile.low, tile.low + tile.num_rows);
    const int32_t high = *std::max_element(tile.high, tile.high + tile.num_rows);
    const int32_t begin = std::max(low / kRun * kRun, part * kPartition);
    const int32_t end = std::min(high, (part + 1) * kPartition);
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

  // Writes the results of an item, whose queries are the state's from `at` on.
  void finish(const Item& item, int32_t at) {
    for (int32_t m = 0; m < item.count; ++m)
      kernels_.finish(own_.tile, own_.state, at + m, query_of(item, m));
  }

  // Partition by partition, each once for all neighbours that have it in common.
  void attend_together(const Bundle& bundle) {
    const Item* const items = bundle.items;
    int32_t at[kTileRows + 1] = {0}, last_part = 0, first_part = items[0].first_part;
    for (int32_t i = 0; i < bundle.count; ++i) {
      at[i + 1] = at[i] + items[i].count;
      first_part = std::min(first_part, items[i].first_part);
      last_part = std::max(last_part, items[i].last_part);
    }
    clear_state(at[bundle.count]);
    int32_t loaded_first = -1, loaded_end = -1;
    for (int32_t part = first_part; part < last_part; ++part)
      for (int32_t first = 0, end = 0; first < bundle.count; first = end) {
        bool seen = false;
        for (end = first; end == first || (end < bundle.count && bundle.common[end] > part); ++end)
          seen = seen || (items[end].first_part <= part && part < items[end].last_part);
        if (!seen) continue;
        if (first != loaded_first || end != loaded_end) load(items + first, end - first);
        loaded_first = first;
        loaded_end = end;
        attend_one(items[first], part);
        kernels_.merge(own_.tile, own_.partial, own_.state, at[first]);
      }
    for (int32_t i = 0; i < bundle.count; ++i) finish(items[i], at[i]);
  }

  // The stored form of a partition: tops, sums, values of the item's queries.
  void attend_part(const Sequence& sequence, int32_t head, int32_t number, int32_t parts,
                   float* stored) {
    const Item item = tile_item(shape_, cut_, sequence, head, 0);
    const int64_t floats = partial_floats(sequence, cut_);
    const int32_t total = item.last_part - item.first_part;
    load(&item, 1);
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
    const Item item = tile_item(shape_, cut_, sequence, head, 0);
    const int64_t floats = partial_floats(sequence, cut_);
    const int32_t total = item.last_part - item.first_part;
    load(&item, 1);
    clear_state(item.count);
    for (int32_t at = 0; at < total; ++at) {
      const float* from = stored + (int64_t{head} * total + at) * floats;
      std::copy_n(from, item.count, own_.partial.top);
      std::copy_n(from + item.count, item.count, own_.partial.sum);
      std::copy_n(from + 2 * item.count, item.count * cut_.width, own_.partial.values);
      kernels_.merge(own_.tile, own_.partial, own_.state, 0);
    }
    finish(item, 0);
  }

  Team& team_;
  const AttentionKernels& kernels_;
  const KvLayout& layout_;
  const AttentionShape& shape_;
  const int64_t layer_offset_;
  const Sequence* const sequences_;
  const int32_t count_;
  const Sharing& sharing_;
  float* const q_;
  ThreadScratch& own_;
  float* const stored_;
  const Cut cut_;
};

}  // namespace

int64_t attention_scratch_bytes(const KvLayout& layout, const AttentionShape& shape,
                                const Sequence* sequences, int32_t count, int32_t num_threads) {
  // Nothing is stored where sequences are attended together.
  const Cut cut = choose_cut(layout, shape, sequences, count, Sharing{}, num_threads);
  int64_t floats = 0;
  for (int32_t s = 0; s < count; ++s) floats += stored_floats(layout, shape, sequences[s], cut);
  return num_threads * kThreadBytes + floats * static_cast<int64_t>(sizeof(float));
}

void attend(Team& team, int thread, const AttentionKernels& kernels, const KvLayout& layout,
            const AttentionShape& shape, int64_t layer_offset, const Sequence* sequences,
            int32_t count, const Sharing& sharing, float* q, char* scratch) {
  Worker worker(team, thread, kernels, layout, shape, layer_offset, sequences, count, sharing, q,
                scratch);
  worker.run();
}

}  // namespace xk
