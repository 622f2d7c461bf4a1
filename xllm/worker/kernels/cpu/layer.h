// A decoder layer in one call, and the head behind the last: every thread of the team runs the
// same phases with a barrier behind each. Structures are mirrored in ../structures.py.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "kernels.h"

namespace xk {

constexpr int32_t kSliceRows = 512;  // rows that the products take at a time

// hidden += out(attention(norm(hidden))); hidden += down(silu(gate(n)) * up(n)), n = norm(hidden).
struct Layer {
  Weight qkv;            // q, k and v, one below the other
  Weight out;
  Weight gate_up;        // data null: the layer ends behind the attention's half
  Weight down;
  const float* input_norm;
  const float* output_norm;
  HeadShape heads;
  AttentionShape attention;
  int32_t hidden;
  int32_t intermediate;
  int64_t kv_offset;     // of this layer's KV in a block
};

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

void run_layer(Team& team, const Kernels& kernels, const Layer& layer, const Step& step,
               float* hidden);
// logits [num_rows, weight.n]
void run_head(Team& team, const Kernels& kernels, const Head& head, const float* hidden,
              const int32_t* rows, int32_t num_rows, float* logits, char* scratch);

}  // namespace xk
