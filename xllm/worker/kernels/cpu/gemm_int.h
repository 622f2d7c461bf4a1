// Products with quantized weights: kInt8, kInt4 and kW8A8.
//
// A weight is an unsigned integer around a zero of 128 (kInt4: 8) times a scale: one scale for each
// output, or (kInt4) one for each output and group of inputs. A row of x is rounded to integers
// too, each group of its inputs with a scale of its own: to 16 bits beside kInt8 and kInt4, where
// that costs less than bfloat16 would, to 8 bits beside kW8A8. The products of a group are exact
// integers; groups are added in fp32, in their order. All variants, and the twin in torch, give the
// same bits.
//
// Packed, by lines of 64 inputs of a block of 16 outputs:
//   kInt8, kW8A8  [n/16][k/64][16][16][4] bytes: units of 4 inputs, the outputs of a unit together
//   kInt4         [n/16][k/64][8][16][4] bytes: two units a byte, the first in its low half
// padded to whole blocks and lines. `group` is a multiple of 64, of 512 at most beside 16 bits.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "pack.h"

namespace xk {

constexpr int kIntLine = 64;  // inputs of a line

inline bool is_integer(int32_t kind) { return kind == kInt8 || kind == kInt4 || kind == kW8A8; }
inline int64_t int_lines(int32_t k) { return (static_cast<int64_t>(k) + kIntLine - 1) / kIntLine; }
inline int int_line_bytes(int32_t kind) { return kind == kInt4 ? 512 : 1024; }

int64_t int_packed_bytes(int32_t kind, int64_t n, int32_t k);

// Quantizes and packs as pack_rows does; block b goes to `packed` and `scales` as that of number
// first + stride * b. scales: float [n/16][16], kInt4: bfloat16 [n/16][groups][16].
void pack_int_rows(int32_t kind, int32_t group, const void* source, SourceType type, int64_t rows,
                   int32_t k, int64_t ld, void* packed, void* scales, int64_t first_block,
                   int64_t last_block, int64_t first, int64_t stride);

// As gemm.
void gemm_int(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
              int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch);

// The name of the best variant for quantized weights.
const char* int_variant_name();

}  // namespace xk
