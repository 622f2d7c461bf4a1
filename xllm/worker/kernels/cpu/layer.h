// A decoder layer in one call, and the head behind the last: every thread of the team runs the
// same phases with a barrier behind each. Structures are mirrored in ../structures.py.
#pragma once

#include "attention.h"
#include "experts.h"
#include "gemm.h"
#include "kernels.h"

namespace xk {

constexpr int32_t kSliceRows = 512;  // rows that the products take at a time

// The halves of a layer: out(attention(norm(hidden))), and down(silu(gate(n)) * up(n)) where
// n = norm(hidden), or what the experts of each row give for it. Each is added to hidden, or stored on its own: a rank that has a part of the
// weights sums its results with the others' first.
enum Halves : int32_t { kAttentionHalf = 1, kMlpHalf = 2, kBothHalves = 3 };

struct Layer {
  Weight qkv;            // q, k and v, one below the other
  Weight out;
  Weight gate_up;        // data null: of a layer with experts
  Weight down;
  const float* input_norm;
  const float* output_norm;
  HeadShape heads;
  AttentionShape attention;
  int32_t hidden;
  int32_t intermediate;
  int64_t kv_offset;     // of this layer's KV in a block
  const Experts* experts;
};

// Of experts, kGateUp is their choice and all that leads to silu(gate) * up, kDown the rest.
enum Phase { kNorm, kQkv, kRope, kAttention, kOut, kGateUp, kDown, kHead, kNumPhases };

struct Step {
  int32_t num_rows;
  int32_t num_sequences;
  const Sequence* sequences;    // in the order of their rows, which they cover
  const float* cos;            // [rows, rotary_dim / 2]
  const float* sin;
  KvLayout kv;
  char* scratch;               // aligned to 64 bytes
  int64_t scratch_bytes;
  int64_t* phase_ns;           // [kNumPhases], added to; or null
  Sharing sharing;
};

// Logits of some rows of hidden [*, size]: head(norm(hidden[rows])).
struct Head {
  Weight weight;
  const float* norm;
  float eps;
  int32_t hidden;
};

// Where a row's token lies: its block, and its place in there.
struct TokenPlace {
  char* block;
  int32_t offset;
};
TokenPlace find_token(const Step& step, int32_t row);

int64_t layer_scratch_bytes(const Layer& layer, const Step& step, int32_t num_threads);
int64_t head_scratch_bytes(const Head& head, int32_t num_rows);

// halves: of Halves. out: null to add to hidden, or [rows, hidden] for the result of one half,
// which leaves hidden as it is.
void run_layer(Team& team, const Kernels& kernels, const Layer& layer, const Step& step,
               float* hidden, int32_t halves, float* out);
// `count` layers one after the other, hidden in place; the step's scratch serves each.
void run_layers(Team& team, const Kernels& kernels, const Layer* const* layers, int32_t count,
                const Step& step, float* hidden);
// logits [num_rows, weight.n]
void run_head(Team& team, const Kernels& kernels, const Head& head, const float* hidden,
              const int32_t* rows, int32_t num_rows, float* logits, char* scratch);

}  // namespace xk
