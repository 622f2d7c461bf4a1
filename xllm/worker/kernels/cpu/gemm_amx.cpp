// AMX: tiles of 16 rows by 32 bfloat16 inputs against tiles of 32 inputs by 16 outputs, for 16 rows
// and more. Weights are read as they are packed; x is rounded to bfloat16, row by row.
//
// Simple on purpose: 32 rows by 32 outputs a step, whole k, one panel of weights at a time.
#include "gemm_variants.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")

#include "gemm_loops.h"

namespace xk {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 32;

struct alignas(64) TileShape {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3 sums, 4 and 5 rows of x, 6 and 7 weights: all of 16 rows of 64 bytes.
void shape_tiles() {
  TileShape shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = kTileRows;
  _tile_loadconfig(&shape);
}

// 32 rows of x by two blocks over `inputs` (a multiple of 32) inputs; `tail` holds the weights of
// the last, incomplete 32 inputs, or is null.
void amx_tile(const char* x, int64_t row_bytes, const char* (&w)[2], const char* (&tail)[2],
              int whole, bool has_tail, float* sums, int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < whole + (has_tail ? 1 : 0); ++i) {
    const char* first = i < whole ? w[0] + i * 1024 : tail[0];
    const char* second = i < whole ? w[1] + i * 1024 : tail[1];
    _tile_loadd(4, x + i * 64, row_bytes);
    _tile_loadd(5, x + i * 64 + kTileRows * row_bytes, row_bytes);
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, sums + kBlock, stride * 4);
  _tile_stored(2, sums + kTileRows * stride, stride * 4);
  _tile_stored(3, sums + kTileRows * stride + kBlock, stride * 4);
}

void amx_panel(const Call& call, const char* x, int64_t row_bytes, int64_t panel, int64_t blocks,
               float* sums) {
  const int64_t pairs = (call.weight.k + 1) / 2;
  const int whole = static_cast<int>(pairs / 16), rest = static_cast<int>(pairs % 16);
  const char* data = static_cast<const char*>(call.weight.data);
  alignas(64) char tails[2][1024] = {};
  const char* w[2];
  const char* tail[2];
  for (int b = 0; b < 2; ++b) {
    const int64_t block = 2 * panel + b < blocks ? 2 * panel + b : blocks - 1;
    w[b] = data + block * pairs * kStepBytes;
    tail[b] = tails[b];
    __builtin_memcpy(tails[b], w[b] + whole * 1024, static_cast<size_t>(rest) * kStepBytes);
  }
  const int count = static_cast<int>(blocks - 2 * panel < 2 ? blocks - 2 * panel : 2);
  for (int32_t row = 0; row < call.rows; row += 2 * kTileRows) {
    amx_tile(x + row * row_bytes, row_bytes, w, tail, whole, rest > 0, sums, 2 * kBlock);
    const int left = call.rows - row;
    store_sums(call.weight, call.epilogue, 2 * panel, count, sums, 2 * kBlock,
               left < 2 * kTileRows ? left : 2 * kTileRows, call.y + row * call.ldy, call.ldy);
  }
}

}  // namespace

void gemm_amx(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
              int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  if (weight.kind != kBf16) {
    gemm_avx512(team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch);
    return;
  }
  const Call call{team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch};
  const int64_t blocks = num_blocks(weight, epilogue);
  const int32_t lines = (weight.k + kTileInputs - 1) / kTileInputs;
  const int64_t row_bytes = lines * 64;
  const int64_t padded = (rows + 2 * kTileRows - 1) / (2 * kTileRows) * (2 * kTileRows);
  char* to = static_cast<char*>(scratch);
  for (int64_t r = thread; r < padded; r += team.size()) {
    uint32_t* out = reinterpret_cast<uint32_t*>(to + r * row_bytes);
    for (int32_t line = 0; line < lines; ++line) {
      const int32_t left = r < rows ? weight.k - line * kTileInputs : 0;
      Bf16Lines::line(r < rows ? x + r * ldx + line * kTileInputs : x,
                      left < kTileInputs ? left : kTileInputs, out + line * kLine);
    }
  }
  team.barrier();
  shape_tiles();
  float* sums = own_buffers().sums;
  for (int64_t panel = team.claim(); 2 * panel < blocks; panel = team.claim()) {
    amx_panel(call, to, row_bytes, panel, blocks, sums);
    team.tick();
  }
  _tile_release();
  team.barrier();
}

}  // namespace xk
#endif
