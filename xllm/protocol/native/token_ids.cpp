// Loops over the token ids of a prompt that would be slow in Python. The interface is plain
// pointers and integers, nothing is thrown, and token_ids.py is the only caller. Raise kAbi with
// every change of a signature, and _ABI in token_ids.py with it.
#include <cstddef>
#include <cstdint>
#include <cstring>

#define XT_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kAbi = 2;
constexpr int64_t kDigestBytes = 32;
constexpr size_t kContextBytes = 512;  // OpenSSL's SHA256_CTX has 112

using Init = int (*)(void* context);
using Update = int (*)(void* context, const void* data, size_t size);
using Final = int (*)(uint8_t* digest, void* context);

Init init_hash = nullptr;
Update update_hash = nullptr;
Final final_hash = nullptr;

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The number of up to seven digits that begins here, where eight bytes may be read; `digits` gets
// how many it has. All digits at once: how many there are is not foreseen by a processor.
uint32_t short_number(const char* at, int* digits) {
  uint64_t bytes;
  std::memcpy(&bytes, at, 8);
  bytes ^= 0x3030303030303030;  // digits become their values, anything else 10 or more
  const uint64_t others = (bytes | (bytes + 0x7676767676767676)) & 0x8080808080808080;
  const int count = others == 0 ? 8 : __builtin_ctzll(others) >> 3;
  *digits = count;
  if (count == 0 || count == 8) return 0;
  bytes <<= 64 - 8 * count;  // zeros lead: eight digits
  bytes = (bytes * 10 + (bytes >> 8)) & 0x00ff00ff00ff00ff;
  bytes = (bytes * 100 + (bytes >> 16)) & 0x0000ffff0000ffff;
  return static_cast<uint32_t>((bytes * 10000 + (bytes >> 32)) & 0xffffffff);
}

}  // namespace

XT_API int32_t xt_abi() { return kAbi; }

// The functions of OpenSSL that xt_chain calls. Once, before it.
XT_API void xt_use_sha256(Init init, Update update, Final final) {
  init_hash = init;
  update_hash = update;
  final_hash = final;
}

// Digests of so many blocks of `stride` bytes, each with the digest before it, as SHA-256 makes
// them: `digests` gets 32 bytes for each. 0 where the library refused. Sizes have 32 bits, which
// ctypes passes without being told of.
XT_API int32_t xt_chain(const uint8_t* root, const uint8_t* blocks, int32_t num_blocks,
                        int32_t stride, uint8_t* digests) {
  alignas(64) unsigned char context[kContextBytes];
  const uint8_t* parent = root;
  for (int32_t i = 0; i < num_blocks; ++i) {
    if (!init_hash(context) || !update_hash(context, parent, kDigestBytes) ||
        !update_hash(context, blocks, static_cast<size_t>(stride)) ||
        !final_hash(digests, context))
      return 0;
    parent = digests;
    digests += kDigestBytes;
    blocks += stride;
  }
  return 1;
}

// The largest of so many ids, which need not be aligned; 0 of none.
XT_API uint32_t xt_largest(const uint8_t* ids, int32_t count) {
  uint32_t largest = 0;
  for (int32_t i = 0; i < count; ++i) {
    uint32_t id;
    std::memcpy(&id, ids + 4 * static_cast<int64_t>(i), 4);
    largest = id > largest ? id : largest;
  }
  return largest;
}

// How many numbers a text such as that of xt_read_ids has at most.
XT_API int64_t xt_count_ids(const char* text, int64_t size) {
  int64_t commas = 0;
  for (int64_t i = 0; i < size; ++i) commas += text[i] == ',';
  return commas + 1;
}

// The numbers of a text such as "1, 22,333", which JSON would take between brackets, and which
// have 32 bits. Returns how many, which is what xt_count_ids said, or -1 for any other text.
XT_API int64_t xt_read_ids(const char* text, int64_t size, uint32_t* ids) {
  const char* at = text;
  const char* const end = text + size;
  int64_t count = 0;
  for (;;) {
    while (end - at > 8) {  // most numbers: short ones with a comma behind
      int digits = 0;
      const uint32_t value = short_number(at, &digits);
      if (digits == 0 || digits == 8 || at[digits] != ',' || (*at == '0' && digits > 1)) break;
      ids[count++] = value;
      at += digits + 1;
    }
    while (at != end && is_space(*at)) ++at;
    const char* const first = at;
    uint64_t value = 0;
    while (at != end && is_digit(*at) && at - first < 10)
      value = 10 * value + static_cast<uint64_t>(*at++ - '0');
    if (at == first || value > UINT32_MAX) return -1;
    if (*first == '0' && at - first > 1) return -1;
    ids[count++] = static_cast<uint32_t>(value);
    while (at != end && is_space(*at)) ++at;
    if (at == end) return count;
    if (*at++ != ',') return -1;
  }
}
