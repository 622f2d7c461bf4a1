// The words of a text, and their token ids where a table knows them. Nothing is thrown but where
// memory ends, and words.py is the only caller. Raise kAbi with every change of a signature, and
// _ABI in words.py with it.
#include <cstdint>
#include <cstring>

#include "borders.h"
#include "table.h"

#define XT_API extern "C" __attribute__((visibility("default")))

namespace {

using xllm::Entry;
using xllm::Text;
using xllm::WordTable;

constexpr int32_t kAbi = 3;

// A word that no table knows: where it is in the text, and how many bytes of ids stand before it.
struct Unknown {
  int32_t start, end, ids_bytes;
};

}  // namespace

XT_API int32_t xt_abi() { return kAbi; }

// Copies a text with a NUL between each two words; `parted` has room for twice the text.
// Returns how long that is.
XT_API int32_t xt_part_words(const uint8_t* text, int32_t size, int32_t rule, uint8_t* parted) {
  const Text whole(text, size);
  uint8_t* to = parted;
  for (int32_t at = 0; at < size;) {
    if (at > 0) *to++ = 0;
    const int32_t end = xllm::word_end(whole, at, rule);
    std::memcpy(to, text + at, static_cast<size_t>(end - at));
    to += end - at;
    at = end;
  }
  return static_cast<int32_t>(to - parted);
}

XT_API WordTable* xt_new_table(uint64_t secret) { return new WordTable(secret); }

XT_API void xt_free_table(WordTable* table) { delete table; }

XT_API int64_t xt_table_bytes(const WordTable* table) { return table->num_bytes(); }

// The ids of the words of a text that begin from `start`, which is a border, and before `stop`, as far as `recent` knows them, or `older` does, which may be null: those
// are in `recent` then, too. `ids` has room for four times what lies between, and a word more, and
// `unknown` for one for each byte of that, and one more. Returns how many are unknown; the one behind
// the last says where the next word begins, and where the ids end.
XT_API int32_t xt_look(WordTable* recent, const WordTable* older, const uint8_t* text, int32_t size,
                       int32_t start, int32_t stop, int32_t rule, uint8_t* ids, Unknown* unknown) {
  const Text whole(text, size);
  int32_t ids_bytes = 0, num_unknown = 0, at = start;
  for (int32_t end; at < stop; at = end) {
    end = xllm::word_end(whole, at, rule);
    Entry found;
    bool is_known = false;
    if (end - at <= WordTable::kMaxBytes) {
      const uint64_t hash = recent->hash(text + at, end - at);
      is_known = recent->find(hash, text + at, end - at, &found);
      if (!is_known && older && older->find(hash, text + at, end - at, &found)) {
        is_known = true;
        recent->keep(hash, found);
      }
    }
    if (is_known) {
      std::memcpy(ids + ids_bytes, found.ids, static_cast<size_t>(found.ids_bytes));
      ids_bytes += found.ids_bytes;
    } else {
      unknown[num_unknown++] = {at, end, ids_bytes};
    }
  }
  unknown[num_unknown] = {at, at, ids_bytes};
  return num_unknown;
}

// Keeps words, which lie in a row as their ids do. `sizes`: bytes of the first word and of its ids,
// of the second word, and so on.
XT_API void xt_keep(WordTable* table, const uint8_t* words, const uint8_t* ids,
                    const int32_t* sizes, int32_t num_words) {
  for (int32_t one = 0; one < num_words; ++one) {
    const int32_t word_bytes = sizes[2 * one], ids_bytes = sizes[2 * one + 1];
    // More ids than bytes have no room in xt_look.
    if (word_bytes <= WordTable::kMaxBytes && ids_bytes <= 4 * word_bytes)
      table->keep(table->hash(words, word_bytes), {words, ids, word_bytes, ids_bytes});
    words += word_bytes;
    ids += ids_bytes;
  }
}
