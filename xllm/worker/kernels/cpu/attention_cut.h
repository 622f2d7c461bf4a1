// How the attention of a step is cut into work items; every thread comes to the same cut.
#pragma once

#include "attention.h"

namespace xk {

struct Cut {
  int32_t group;           // heads that share a KV head
  int32_t width;           // head_dim up to a multiple of 16
  int32_t num_parts;       // pieces of a context that are attended apart; 1: none
  int32_t bundle_queries;  // queries of sequences that share memory in one item; 0: none do
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

// Items of one KV head, of kTileRows queries at most in all, that a thread attends together: the
// first common[i] partitions of items[i] are those of items[i - 1].
struct Bundle {
  int32_t count;
  Item items[kTileRows];
  int32_t common[kTileRows];
};

// Contexts are cut only where there is too little to do for the threads otherwise, and sequences
// are attended together only where no item becomes long beside the rest of the work.
Cut choose_cut(const KvLayout& layout, const AttentionShape& shape, const Sequence* sequences,
               int32_t count, const Sharing& sharing, int32_t num_threads);

int32_t num_tiles(const Sequence& sequence, const Cut& cut);

// The first token that a row at `position` sees.
int32_t lowest_token(const AttentionShape& shape, int32_t position);

// Up to 16 queries of a sequence and KV head, and the partitions that they see.
Item tile_item(const AttentionShape& shape, const Cut& cut, const Sequence& sequence,
               int32_t kv_head, int32_t tile);

// Pieces of this sequence's context; those of more than one tile stay whole.
int32_t parts_of(const AttentionShape& shape, const Sequence& sequence, const Cut& cut);

// Numbers of a sequence and KV head that a partition gives, and of all that are stored.
int64_t partial_floats(const Sequence& sequence, const Cut& cut);
int64_t stored_floats(const KvLayout& layout, const AttentionShape& shape,
                      const Sequence& sequence, const Cut& cut);

// Where the bundle ends that begins with order[first]: its sequences are one item a KV head, of
// bundle_queries queries at most if there are several.
int32_t bundle_end(const Cut& cut, const Sequence* sequences, const Sharing& sharing,
                   int32_t first);
Bundle make_bundle(const AttentionShape& shape, const Cut& cut, const Sequence* sequences,
                   const Sharing& sharing, int32_t first, int32_t end, int32_t kv_head);

}  // namespace xk
