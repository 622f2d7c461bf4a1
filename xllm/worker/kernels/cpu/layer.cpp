#include "layer.h"

#include <algorithm>
#include <chrono>

namespace xk {
namespace {

using Clock = std::chrono::steady_clock;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The pieces of a layer's scratch.
struct Scratch {
  float* queries;   // [rows, heads * head_dim]: then what they attended
  float* normed;    // [slice, hidden]
  float* wide;      // [slice, max(q + k + v, intermediate)]
  char* gemm;
  char* attention;
  char* experts;
  int64_t num_bytes;
};

int64_t gemm_bytes(const Weight& weight, int32_t rows) {
  return weight.data ? gemm_scratch_bytes(weight.kind, rows, weight.k) : 0;
}

Scratch cut_scratch(const Layer& layer, const Step& step, int32_t num_threads) {
  const int32_t slice = std::min(step.num_rows, kSliceRows);
  const int64_t q = int64_t{layer.heads.num_heads} * layer.heads.head_dim;
  const int64_t wide = std::max(layer.qkv.n, layer.intermediate);
  char* at = step.scratch;
  const auto take = [&at](int64_t bytes) {
    char* taken = at;
    at += aligned(bytes);
    return taken;
  };
  Scratch found{};
  found.queries = reinterpret_cast<float*>(take(step.num_rows * q * 4));
  found.normed = reinterpret_cast<float*>(take(int64_t{slice} * layer.hidden * 4));
  found.wide = reinterpret_cast<float*>(take(slice * wide * 4));
  found.gemm = take(std::max({gemm_bytes(layer.qkv, slice), gemm_bytes(layer.out, slice),
                              gemm_bytes(layer.gate_up, slice), gemm_bytes(layer.down, slice)}));
  found.attention = take(attention_scratch_bytes(step.kv, layer.attention, step.sequences,
                                                 step.num_sequences, num_threads));
  found.experts =
      take(layer.experts ? experts_scratch_bytes(*layer.experts, slice, num_threads) : 0);
  found.num_bytes = at - step.scratch;
  return found;
}

// One thread's way through a layer.
class LayerRun {
 public:
  LayerRun(Team& team, int thread, const Kernels& kernels, const Layer& layer, const Step& step,
           float* hidden, float* out)
      : team_(team),
        thread_(thread),
        kernels_(kernels),
        layer_(layer),
        step_(step),
        hidden_(hidden),
        out_(out ? out : hidden),
        how_(out ? kStore : kAdd),
        scratch_(cut_scratch(layer, step, team.size())),
        last_(step.phase_ns && thread == 0 ? Clock::now() : Clock::time_point{}) {}

  void run(int32_t halves) {
    if (halves & kAttentionHalf) attention_half();
    if ((halves & kMlpHalf) == 0) return;
    for (int32_t first = 0; first < step_.num_rows; first += kSliceRows) {
      norm(first, layer_.output_norm);
      if (layer_.experts != nullptr)
        pass_experts(first);
      else
        feed_forward(first);
    }
  }

 private:
  void attention_half() {
    for (int32_t first = 0; first < step_.num_rows; first += kSliceRows) project(first);
    attend(team_, thread_, kernels_.attention, step_.kv, layer_.attention, layer_.kv_offset,
           step_.sequences, step_.num_sequences, step_.sharing, scratch_.queries,
           scratch_.attention);
    note(kAttention);
    const int64_t q = int64_t{layer_.heads.num_heads} * layer_.heads.head_dim;
    for (int32_t first = 0; first < step_.num_rows; first += kSliceRows)
      multiply(layer_.out, scratch_.queries + first * q, q, slice_at(first), out_at(first),
               layer_.hidden, how_, kOut);
  }

  float* hidden_at(int32_t row) const { return hidden_ + int64_t{row} * layer_.hidden; }
  float* out_at(int32_t row) const { return out_ + int64_t{row} * layer_.hidden; }
  int32_t slice_at(int32_t first) const { return std::min(step_.num_rows - first, kSliceRows); }

  void norm(int32_t first, const float* weight) {
    const int32_t count = slice_at(first);
    for (int64_t row = team_.claim(); row < count; row = team_.claim())
      kernels_.rows.rms_norm(hidden_at(first + static_cast<int32_t>(row)), weight,
                             layer_.heads.eps, layer_.hidden,
                             scratch_.normed + row * layer_.hidden);
    team_.barrier();
    note(kNorm);
  }

  void multiply(const Weight& weight, const float* x, int64_t ldx, int32_t rows, float* y,
                int64_t ldy, Epilogue epilogue, Phase phase) {
    gemm(team_, thread_, weight, x, ldx, rows, y, ldy, epilogue, scratch_.gemm);
    if (thread_ == 0) team_.tick();
    note(phase);
  }

  void project(int32_t first) {
    const int32_t count = slice_at(first);
    const HeadShape& heads = layer_.heads;
    const int64_t q = int64_t{heads.num_heads} * heads.head_dim;
    const int64_t qkv = q + int64_t{2} * heads.num_kv_heads * heads.head_dim;
    const int64_t angles = heads.rotary_dim / 2;
    norm(first, layer_.input_norm);
    multiply(layer_.qkv, scratch_.normed, layer_.hidden, count, scratch_.wide, qkv, kStore, kQkv);
    for (int64_t row = team_.claim(); row < count; row = team_.claim()) {
      const int64_t at = first + row;
      const TokenPlace place = find_token(step_, static_cast<int32_t>(at));
      kernels_.rows.split_row(heads, step_.kv, scratch_.wide + row * qkv, step_.cos + at * angles,
                              step_.sin + at * angles, scratch_.queries + at * q,
                              place.block + layer_.kv_offset, place.offset);
    }
    team_.barrier();
    note(kRope);
  }

  void feed_forward(int32_t first) {
    const int32_t count = slice_at(first);
    multiply(layer_.gate_up, scratch_.normed, layer_.hidden, count, scratch_.wide,
             layer_.intermediate, kSiluMul, kGateUp);
    multiply(layer_.down, scratch_.wide, layer_.intermediate, count, out_at(first), layer_.hidden,
             how_, kDown);
  }

  void pass_experts(int32_t first) {
    ExpertPass pass(team_, thread_, *layer_.experts, scratch_.normed, slice_at(first),
                    scratch_.experts);
    pass.route();
    pass.gate_up();
    note(kGateUp);
    pass.down(out_at(first), how_);
    note(kDown);
  }

  void note(Phase phase) {
    if (step_.phase_ns == nullptr || thread_ != 0) return;
    const Clock::time_point now = Clock::now();
    step_.phase_ns[phase] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

  Team& team_;
  const int thread_;
  const Kernels& kernels_;
  const Layer& layer_;
  const Step& step_;
  float* const hidden_;
  float* const out_;
  const Epilogue how_;
  const Scratch scratch_;
  Clock::time_point last_;
};

template <class F>
void on_team(Team& team, F& work) {
  team.run([](void* argument, int thread) { (*static_cast<F*>(argument))(thread); }, &work);
}

}  // namespace

TokenPlace find_token(const Step& step, int32_t row) {
  const Sequence* end = step.sequences + step.num_sequences;
  const auto after = [](int32_t wanted, const Sequence& s) { return wanted < s.first_row; };
  const Sequence& sequence = *(std::upper_bound(step.sequences, end, row, after) - 1);
  const int32_t position = sequence.start + row - sequence.first_row;
  const int32_t number = position / step.kv.block_size;
  const int64_t block = sequence.table ? sequence.table[number] : number;
  return {sequence.base + block * step.kv.block_bytes, position % step.kv.block_size};
}

int64_t layer_scratch_bytes(const Layer& layer, const Step& step, int32_t num_threads) {
  return cut_scratch(layer, step, num_threads).num_bytes;
}

int64_t head_scratch_bytes(const Head& head, int32_t num_rows) {
  return aligned(int64_t{num_rows} * head.hidden * 4) + gemm_bytes(head.weight, num_rows);
}

void run_layer(Team& team, const Kernels& kernels, const Layer& layer, const Step& step,
               float* hidden, int32_t halves, float* out) {
  auto work = [&](int thread) {
    LayerRun(team, thread, kernels, layer, step, hidden, out).run(halves);
  };
  on_team(team, work);
}

void run_layers(Team& team, const Kernels& kernels, const Layer* const* layers, int32_t count,
                const Step& step, float* hidden) {
  auto work = [&](int thread) {
    // A layer ends with the barrier of its last product, so the next may read what it left.
    for (int32_t i = 0; i < count; ++i)
      LayerRun(team, thread, kernels, *layers[i], step, hidden, nullptr).run(kBothHalves);
  };
  on_team(team, work);
}

void run_head(Team& team, const Kernels& kernels, const Head& head, const float* hidden,
              const int32_t* rows, int32_t num_rows, float* logits, char* scratch) {
  auto* normed = reinterpret_cast<float*>(scratch);
  char* rest = scratch + aligned(int64_t{num_rows} * head.hidden * 4);
  auto work = [&](int thread) {
    for (int64_t row = team.claim(); row < num_rows; row = team.claim())
      kernels.rows.rms_norm(hidden + int64_t{rows[row]} * head.hidden, head.norm, head.eps,
                            head.hidden, normed + row * head.hidden);
    team.barrier();
    gemm(team, thread, head.weight, normed, head.hidden, num_rows, logits, head.weight.n, kStore,
         rest);
  };
  on_team(team, work);
  team.tick();
}

}  // namespace xk
