#include "attention_cut.h"

#include <algorithm>

namespace xk {
namespace {

int64_t num_queries(const Sequence& sequence, const Cut& cut) {
  return static_cast<int64_t>(sequence.num_rows) * cut.group;
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

// The most queries of a bundle with which each thread still has two items or more to do.
int32_t choose_bundle(const KvLayout& layout, const Cut& cut, const Sequence* sequences,
                      int32_t count, const Sharing& sharing, int32_t num_threads) {
  int64_t total = 0, longest = 0;
  for (int32_t s = 0; s < count; ++s)
    total += num_queries(sequences[s], cut) * (sequences[s].start + sequences[s].num_rows);
  for (int32_t i = 0; i < sharing.count; ++i) {
    const Sequence& sequence = sequences[sharing.order[i]];
    longest = std::max<int64_t>(longest, sequence.start + sequence.num_rows);
  }
  for (int32_t queries = kTileRows; queries >= 2 * cut.group; queries /= 2)
    if (2 * num_threads * longest * queries <= total * layout.num_kv_heads || num_threads == 1)
      return queries;
  return 0;
}

}  // namespace

Cut choose_cut(const KvLayout& layout, const AttentionShape& shape, const Sequence* sequences,
               int32_t count, const Sharing& sharing, int32_t num_threads) {
  Cut cut{shape.num_heads / layout.num_kv_heads, (layout.head_dim + 15) / 16 * 16, 1, 0};
  int64_t num_items = 0;
  for (int32_t s = 0; s < count; ++s)
    num_items += static_cast<int64_t>(num_tiles(sequences[s], cut)) * layout.num_kv_heads;
  const int64_t wanted = 4 * static_cast<int64_t>(num_threads);
  if (num_threads > 1 && num_items > 0 && num_items < wanted)
    cut.num_parts = static_cast<int32_t>((wanted + num_items - 1) / num_items);
  else if (sharing.count > 0)
    cut.bundle_queries = choose_bundle(layout, cut, sequences, count, sharing, num_threads);
  return cut;
}

int32_t num_tiles(const Sequence& sequence, const Cut& cut) {
  return static_cast<int32_t>((num_queries(sequence, cut) + kTileRows - 1) / kTileRows);
}

int32_t lowest_token(const AttentionShape& shape, int32_t position) {
  return shape.window > 0 ? std::max(position - shape.window + 1, 0) : 0;
}

Item tile_item(const AttentionShape& shape, const Cut& cut, const Sequence& sequence,
               int32_t kv_head, int32_t tile) {
  Item item{&sequence, kv_head, tile * kTileRows, 0, 0, 0};
  item.count = std::min(kTileRows, sequence.num_rows * cut.group - item.first);
  see(shape, sequence.start + item.first / cut.group,
      sequence.start + (item.first + item.count - 1) / cut.group, item);
  return item;
}

int32_t parts_of(const AttentionShape& shape, const Sequence& sequence, const Cut& cut) {
  if (cut.num_parts == 1 || num_tiles(sequence, cut) > 1) return 1;
  return std::min(cut.num_parts, num_partitions(shape, sequence));
}

int64_t partial_floats(const Sequence& sequence, const Cut& cut) {
  return num_queries(sequence, cut) * (cut.width + 2);
}

int64_t stored_floats(const KvLayout& layout, const AttentionShape& shape,
                      const Sequence& sequence, const Cut& cut) {
  if (parts_of(shape, sequence, cut) == 1) return 0;
  return partial_floats(sequence, cut) * num_partitions(shape, sequence) * layout.num_kv_heads;
}

int32_t bundle_end(const Cut& cut, const Sequence* sequences, const Sharing& sharing,
                   int32_t first) {
  int64_t queries = num_queries(sequences[sharing.order[first]], cut);
  int32_t end = first + 1;
  for (; end < sharing.count && sharing.common[end] > 0; ++end) {
    queries += num_queries(sequences[sharing.order[end]], cut);
    if (queries > cut.bundle_queries) break;
  }
  return end;
}

Bundle make_bundle(const AttentionShape& shape, const Cut& cut, const Sequence* sequences,
                   const Sharing& sharing, int32_t first, int32_t end, int32_t kv_head) {
  Bundle bundle{};
  for (int32_t i = first; i < end; ++i) {
    bundle.items[bundle.count] =
        tile_item(shape, cut, sequences[sharing.order[i]], kv_head, 0);
    bundle.common[bundle.count++] = i > first ? sharing.common[i] : 0;
  }
  return bundle;
}

}  // namespace xk
