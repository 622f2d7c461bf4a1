// Packing: rows of a weight as checkpoints hold it (row-major, [outputs][inputs]) to blocks.
#pragma once

#include <cstdint>

namespace xk {

enum SourceType : int32_t { kFromBf16 = 0, kFromFp16 = 1, kFromFp32 = 2 };

// `count` numbers of a source from `first` on, to floats.
void read_numbers(const void* source, SourceType type, int64_t first, int64_t count, float* to);

// Bytes of n outputs of k inputs, padded to whole blocks.
int64_t packed_bytes(int32_t kind, int64_t n, int32_t k);

// Packs the blocks of 16 rows [first_block, last_block) of a source of `rows` rows with `ld`
// elements from row to row; block b goes to packed + b * stride blocks. Rows beyond the source are
// zeros.
void pack_rows(int32_t kind, const void* source, SourceType type, int64_t rows, int32_t k,
               int64_t ld, void* packed, int64_t first_block, int64_t last_block,
               int64_t stride = 1);

}  // namespace xk
