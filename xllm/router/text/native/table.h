// Token ids of words, by the words. Not for two threads at once.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace xllm {

// A word and its ids, as they lie in a table: whoever holds one must not put anything into it.
struct Entry {
  const uint8_t* word;
  const uint8_t* ids;
  int32_t word_bytes;
  int32_t ids_bytes;
};

class WordTable {
 public:
  // Of a word, and of its ids: of longer ones nothing is kept, since they hardly come again.
  static constexpr int32_t kMaxBytes = 252;

  // `secret`: without it nobody can tell which words meet at a place.
  explicit WordTable(uint64_t secret) : secret_(secret), slots_(kFirstSlots) {}

  int64_t num_bytes() const {
    return static_cast<int64_t>(slots_.capacity() * sizeof(Slot) + entries_.capacity());
  }

  uint64_t hash(const uint8_t* word, int32_t size) const {
    uint64_t state = secret_;
    for (int32_t left = size; left > 0; word += 8, left -= 8) {
      uint64_t part = 0;
      std::memcpy(&part, word, static_cast<size_t>(left < 8 ? left : 8));
      state = mixed(state ^ part);
    }
    return mixed(state ^ static_cast<uint64_t>(size));  // which tells apart what ends in NULs
  }

  bool find(uint64_t hash, const uint8_t* word, int32_t size, Entry* found) const {
    for (size_t at = place(hash);; at = next(at)) {
      const Slot& slot = slots_[at];
      if (!slot.entry) return false;
      if (slot.tag != tag(hash)) continue;
      *found = entry(slot);
      if (found->word_bytes == size && !std::memcmp(found->word, word, static_cast<size_t>(size)))
        return true;
    }
  }

  // False where nothing is kept: the word is there already, too long, or there is no room.
  bool keep(uint64_t hash, const Entry& given) {
    Entry known;
    if (given.word_bytes > kMaxBytes || given.ids_bytes > kMaxBytes) return false;
    if (given.word_bytes < 1 || given.ids_bytes < 0) return false;
    if (entries_.size() > kMaxEntries || find(hash, given.word, given.word_bytes, &known))
      return false;
    if (3 * num_words_ >= 2 * slots_.size()) grow();
    const size_t start = entries_.size();
    entries_.resize(start + 2 + static_cast<size_t>(given.ids_bytes + given.word_bytes));
    uint8_t* to = entries_.data() + start;
    to[0] = static_cast<uint8_t>(given.word_bytes);
    to[1] = static_cast<uint8_t>(given.ids_bytes);
    std::memcpy(to + 2, given.ids, static_cast<size_t>(given.ids_bytes));
    std::memcpy(to + 2 + given.ids_bytes, given.word, static_cast<size_t>(given.word_bytes));
    put({tag(hash), static_cast<uint32_t>(start + 1)}, hash);
    ++num_words_;
    return true;
  }

 private:
  // Where a word's entry lies, plus one: 0 where there is none.
  struct Slot {
    uint32_t tag = 0;
    uint32_t entry = 0;
  };
  static constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  static constexpr size_t kFirstSlots = 16;  // powers of two
  static constexpr size_t kMaxEntries = size_t{1} << 31;

  uint64_t mixed(uint64_t state) const {
    const __uint128_t product = static_cast<__uint128_t>(state) * ((secret_ ^ kOdd) | 1);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }

  static uint32_t tag(uint64_t hash) { return static_cast<uint32_t>(hash); }
  size_t place(uint64_t hash) const { return (hash >> 32) & (slots_.size() - 1); }
  size_t next(size_t at) const { return (at + 1) & (slots_.size() - 1); }

  Entry entry(const Slot& slot) const {
    const uint8_t* from = entries_.data() + slot.entry - 1;
    return {from + 2 + from[1], from + 2, from[0], from[1]};
  }

  void put(Slot slot, uint64_t hash) {
    size_t at = place(hash);
    while (slots_[at].entry) at = next(at);
    slots_[at] = slot;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (!slot.entry) continue;
      const Entry known = entry(slot);
      put(slot, hash(known.word, known.word_bytes));
    }
  }

  uint64_t secret_;
  std::vector<Slot> slots_;
  std::vector<uint8_t> entries_;
  size_t num_words_ = 0;
};

}  // namespace xllm
