// Where words end, as the patterns of word_borders.py find them, with Python's whitespace.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace xllm {

constexpr int32_t kGpt2 = 1;  // the other rule is LETTERS_FIRST

// What the patterns tell apart: a space, a newline, other whitespace, and the rest.
enum Kind : uint8_t { kSigns, kSpace, kNewline, kBlank, kLead };

struct Kinds {
  Kind of[256] = {};
  constexpr Kinds() {
    for (int c : {0x09, 0x0b, 0x0c, 0x1c, 0x1d, 0x1e, 0x1f}) of[c] = kBlank;
    of[0x20] = kSpace;
    of[0x0a] = of[0x0d] = kNewline;
    for (int c : {0xc2, 0xe1, 0xe2, 0xe3}) of[c] = kLead;  // whitespace of several bytes, perhaps
  }
};
constexpr Kinds kKinds;

// UTF-8. Bytes of what is no whitespace are signs, each.
class Text {
 public:
  Text(const uint8_t* text, int32_t size) : text_(text), size_(size) {}

  bool ends_at(int32_t at) const { return at >= size_; }
  uint8_t byte(int32_t at) const { return text_[at]; }
  Kind kind(int32_t at) const {
    const Kind kind = kKinds.of[text_[at]];
    return kind != kLead ? kind : wide(at) ? kBlank : kSigns;
  }
  bool has_signs(int32_t at) const { return at < size_ && kind(at) == kSigns; }

  int32_t behind_signs(int32_t at) const {
    while (at < size_ && kind(at) == kSigns) ++at;
    return at;
  }
  int32_t behind_whitespace(int32_t at) const {
    while (at < size_ && kind(at) != kSigns) at += width(at);
    return at;
  }
  int32_t behind_blanks(int32_t at) const {  // whitespace but newlines
    while (at < size_ && (kind(at) == kSpace || kind(at) == kBlank)) at += width(at);
    return at;
  }
  // Behind the last newline of the whitespace that begins here; `at` where it has none.
  int32_t behind_last_newline(int32_t at) const {
    int32_t found = at;
    for (; at < size_ && kind(at) != kSigns; at += width(at))
      if (kind(at) == kNewline) found = at + 1;
    return found;
  }

 private:
  // Bytes of the whitespace here.
  int32_t width(int32_t at) const { return text_[at] < 0x80 ? 1 : wide(at); }

  // Bytes of whitespace that has several; 0: it is none.
  int32_t wide(int32_t at) const {
    if (size_ - at < 2) return 0;
    const uint8_t first = text_[at], second = text_[at + 1];
    if (first == 0xc2) return second == 0x85 || second == 0xa0 ? 2 : 0;
    if (size_ - at < 3) return 0;
    const uint8_t third = text_[at + 2];
    bool found = false;
    if (first == 0xe1) {
      found = second == 0x9a && third == 0x80;  // U+1680
    } else if (first == 0xe2 && second == 0x80) {
      found = third <= 0x8a || third == 0xa8 || third == 0xa9 || third == 0xaf;  // U+2000 to 202F
    } else if (first == 0xe2) {
      found = second == 0x81 && third == 0x9f;  // U+205F
    } else if (first == 0xe3) {
      found = second == 0x80 && third == 0x80;  // U+3000
    }
    return found ? 3 : 0;
  }

  const uint8_t* text_;
  int32_t size_;
};

// GPT2_BORDERS.words
inline int32_t gpt2_end(const Text& text, int32_t at) {
  at = text.behind_whitespace(at);
  if (text.ends_at(at)) return at;
  at = text.behind_signs(at);
  while (!text.ends_at(at) && text.kind(at) != kSpace) {
    if (text.byte(at) == '\n' && text.has_signs(at + 1)) return at + 1;
    at = text.behind_signs(text.behind_whitespace(at));
  }
  return at;
}

// LETTERS_FIRST_BORDERS.words
inline int32_t letters_first_end(const Text& text, int32_t at) {
  const int32_t first = text.behind_blanks(at);
  if (!text.has_signs(first)) {
    const int32_t behind = text.behind_last_newline(at);
    return behind > at ? behind : text.behind_whitespace(at);
  }
  at = text.behind_signs(first);
  while (!text.ends_at(at) && text.kind(at) == kBlank) {
    const int32_t next = text.behind_blanks(at);
    if (!text.has_signs(next)) break;
    at = text.behind_signs(next);
  }
  if (text.ends_at(at) || text.kind(at) == kSpace) return at;
  return text.behind_last_newline(at);
}

// Behind the word that begins here.
inline int32_t word_end(const Text& text, int32_t at, int32_t rule) {
  return rule == kGpt2 ? gpt2_end(text, at) : letters_first_end(text, at);
}

}  // namespace xllm
