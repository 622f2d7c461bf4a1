// What happens to single rows between the products: norms, rotary embedding, KV writes, arg-max.
#pragma once

#include <cstdint>

#include "attention.h"

namespace xk {

// A row of q, k and v as one product gives it, and what becomes of it.
struct HeadShape {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;   // the first numbers of a head are rotated, in halves; 0: none
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  float eps;
};

struct RowKernels {
  // out = x / rms(x) * weight over n numbers; may be in place.
  void (*rms_norm)(const float* x, const float* weight, float eps, int32_t n, float* out);
  // Norms and rotates the heads of one row qkv [heads + 2 kv_heads, head_dim]: q goes to `q`, k
  // and v to token `offset` of a layer's part of a block. cos, sin [rotary_dim / 2].
  void (*split_row)(const HeadShape& shape, const KvLayout& layout, float* qkv, const float* cos,
                    const float* sin, float* q, char* layer, int32_t offset);
  // Writes k and v [kv_heads, head_dim] of one row to token `offset` of a layer's part of a block.
  void (*write_row)(const KvLayout& layout, const float* k, const float* v, char* layer,
                    int32_t offset);
  // The largest of n numbers and its place, the first of equals; NaN where there is one.
  float (*arg_max)(const float* x, int32_t n, int32_t* place);
};

}  // namespace xk
