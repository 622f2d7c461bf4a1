// The C interface of attention, layers and head. What it is given is checked on the Python side.
// `variant` is a number of variant.h.
#include "layer.h"

#include <algorithm>

using namespace xk;

namespace {

template <class F>
void on_team(Team& team, const F& work) {
  void* argument = const_cast<F*>(&work);
  team.run([](void* f, int thread) { (*static_cast<const F*>(f))(thread); }, argument);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t xk_layer_scratch(const Team* team, const Layer* layer, const Step* step) {
  return layer_scratch_bytes(*layer, *step, team->size());
}

// One layer of all rows, hidden [rows, hidden] in place (out null), or one half of it into `out`:
// see run_layer. -1: the step's scratch is too small; -2: experts are in slots that there are not.
int32_t xk_layer(Team* team, int32_t variant, const Layer* layer, const Step* step, float* hidden,
                 int32_t halves, float* out) {
  if (layer_scratch_bytes(*layer, *step, team->size()) > step->scratch_bytes) return -1;
  if (layer->experts != nullptr && !slots_exist(*layer->experts)) return -2;
  run_layer(*team, kernels_of(variant), *layer, *step, hidden, halves, out);
  return 0;
}

int64_t xk_layers_scratch(const Team* team, const Layer* const* layers, int32_t count,
                          const Step* step) {
  int64_t most = 0;
  for (int32_t i = 0; i < count; ++i)
    most = std::max(most, layer_scratch_bytes(*layers[i], *step, team->size()));
  return most;
}

// `count` layers of all rows, one after the other, hidden [rows, hidden] in place. -1 as above; -2 - i:
// the experts of layer i are in slots that there are not. Then nothing was computed.
int32_t xk_layers(Team* team, int32_t variant, const Layer* const* layers, int32_t count,
                  const Step* step, float* hidden) {
  if (xk_layers_scratch(team, layers, count, step) > step->scratch_bytes) return -1;
  for (int32_t i = 0; i < count; ++i)
    if (layers[i]->experts != nullptr && !slots_exist(*layers[i]->experts)) return -2 - i;
  run_layers(*team, kernels_of(variant), layers, count, *step, hidden);
  return 0;
}

int64_t xk_experts_scratch(const Team* team, const Experts* experts, int32_t rows) {
  return experts_scratch_bytes(*experts, std::min(rows, kSliceRows), team->size());
}

// x [rows, hidden] through its experts to y [rows, hidden]; scratch aligned to 64 bytes. -2: as
// above.
int32_t xk_experts(Team* team, const Experts* experts, const float* x, int32_t rows, float* y,
                   char* scratch) {
  if (!slots_exist(*experts)) return -2;
  on_team(*team, [&](int thread) {
    for (int64_t first = 0; first < rows; first += kSliceRows) {
      const int64_t at = first * experts->hidden;
      const int32_t count = std::min(rows - static_cast<int32_t>(first), kSliceRows);
      ExpertPass pass(*team, thread, *experts, x + at, count, scratch);
      pass.route();
      pass.gate_up();
      pass.down(y + at, kStore);
    }
  });
  return 0;
}

int64_t xk_head_scratch(const Head* head, int32_t num_rows) {
  return head_scratch_bytes(*head, num_rows);
}

// logits [num_rows, n] of rows of hidden; scratch aligned to 64 bytes.
void xk_head(Team* team, int32_t variant, const Head* head, const float* hidden,
             const int32_t* rows, int32_t num_rows, float* logits, char* scratch) {
  run_head(*team, kernels_of(variant), *head, hidden, rows, num_rows, logits, scratch);
}

int64_t xk_attend_scratch(const Team* team, const AttentionShape* shape, const Step* step) {
  return attention_scratch_bytes(step->kv, *shape, step->sequences, step->num_sequences,
                                 team->size());
}

// Writes k and v [rows, kv_heads, head_dim], then turns q [rows, heads, head_dim] into what it
// attends; -1: the step's scratch is too small.
int32_t xk_attend(Team* team, int32_t variant, const AttentionShape* shape, const Step* step,
                  int64_t kv_offset, float* q, const float* k, const float* v) {
  if (xk_attend_scratch(team, shape, step) > step->scratch_bytes) return -1;
  const Kernels& kernels = kernels_of(variant);
  const int64_t width = int64_t{step->kv.num_kv_heads} * step->kv.head_dim;
  on_team(*team, [&](int thread) {
    for (int64_t row = team->claim(); row < step->num_rows; row = team->claim()) {
      const TokenPlace place = find_token(*step, static_cast<int32_t>(row));
      kernels.rows.write_row(step->kv, k + row * width, v + row * width, place.block + kv_offset,
                             place.offset);
    }
    team->barrier();
    attend(*team, thread, kernels.attention, step->kv, *shape, kv_offset, step->sequences,
           step->num_sequences, step->sharing, q, step->scratch);
  });
  return 0;
}

// The largest number of each of `rows` rows of n, and its place; NaN for a row that holds one.
void xk_arg_max(Team* team, int32_t variant, const float* x, int64_t stride, int32_t rows,
                int32_t n, int32_t* places, float* tops) {
  const Kernels& kernels = kernels_of(variant);
  on_team(*team, [&](int) {
    for (int64_t row = team->claim(); row < rows; row = team->claim())
      tops[row] = kernels.rows.arg_max(x + row * stride, n, places + row);
  });
  team->tick();
}

}  // extern "C"
#pragma GCC visibility pop
