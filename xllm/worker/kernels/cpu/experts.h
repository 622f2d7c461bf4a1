// The feed-forward half of a layer with experts: a router chooses a few gated MLPs for each row,
// whose results are summed by its shares.
//
// Invariant: a row's result depends on that row alone, bit for bit: products as gemm.h promises,
// the sum over a row's experts in the order of its own choice. Slots and counts change nothing.
#pragma once

#include "gemm.h"

namespace xk {

constexpr int32_t kExpertRows = 256;  // of one expert that a product takes at a time, at most

// `gate_up` and `down` hold the weights of all slots one behind the other, each padded to whole
// blocks: 2 * ceil(inner / 16) blocks of `hidden` inputs, ceil(hidden / 16) of `inner`. No biases.
struct Experts {
  Weight router;         // num_experts outputs
  Weight gate_up;
  Weight down;
  const int64_t* slots;  // [num_experts]: the slot of each expert's weights
  int32_t* counts;       // [num_experts]: the rows that it got are added
  int32_t num_experts;
  int32_t num_slots;
  int32_t top_k;
  int32_t normalise;     // the shares of a row's experts are made to sum to one
  int32_t hidden;
  int32_t inner;
};

// Whether the table names slots that there are.
bool slots_exist(const Experts& experts);

int64_t experts_scratch_bytes(const Experts& experts, int32_t rows, int32_t num_threads);

// One thread's part in a pass of some rows through their experts; every thread of a run makes the
// same calls in this order. Each ends with a barrier.
class ExpertPass {
 public:
  // x [rows, hidden], finished before. scratch: experts_scratch_bytes, aligned to 64 bytes.
  ExpertPass(Team& team, int thread, const Experts& experts, const float* x, int32_t rows,
             char* scratch);

  void route();    // chooses the experts, sorts the rows by slot
  void gate_up();  // silu(gate) * up of all experts
  // The experts' results, summed row by row: y [rows, hidden], stored (kStore) or added (kAdd).
  void down(float* y, Epilogue how);

 private:
  struct Stretch {  // rows of one slot that a product takes together
    int32_t slot, first, count;
  };
  struct Scratch {
    float* logits;       // [rows, experts]
    float* shares;       // [rows, top_k]
    int32_t* chosen;     // [rows, top_k]: experts, best first
    int32_t* places;     // [rows, top_k]: where that choice stands in the order by slots
    int32_t* sources;    // [rows * top_k]: whose choice stands there
    int32_t* begins;     // [slots + 1]: where a slot's choices begin
    int32_t* num_stretches;
    Stretch* stretches;
    float* sorted;       // [rows * top_k, hidden]: rows by slot; later what their experts gave
    float* wide;         // [rows * top_k, inner]
    char* gemm;
    char* own_gemm;      // of this thread
    int64_t num_bytes;
  };
  friend int64_t experts_scratch_bytes(const Experts&, int32_t, int32_t);

  static Scratch cut(const Experts& experts, int32_t rows, int32_t num_threads, int thread,
                     char* scratch);
  void sort();
  void multiply(const Weight& all, const float* x, float* y, Epilogue epilogue);

  Team& team_;
  const int thread_;
  const Experts& experts_;
  const float* const x_;
  const int32_t rows_;
  const Scratch scratch_;
};

}  // namespace xk
