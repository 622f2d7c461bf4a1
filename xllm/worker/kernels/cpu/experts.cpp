#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm_int.h"
#include "pack.h"

namespace xk {
namespace {

constexpr int kBlock = 16;
constexpr int64_t kClaims = 16;      // of a thread and product, about
constexpr int64_t kMostBlocks = 32;  // of a claim
constexpr int32_t kSumColumns = 256;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t scale_bytes(const Weight& weight) {  // of a block
  if (!is_integer(weight.kind)) return 0;
  if (weight.kind != kInt4) return kBlock * 4;
  return (weight.k + weight.group - 1) / weight.group * kBlock * 2;
}

// n outputs of a weight from a block on.
Weight part_of(const Weight& all, int64_t block, int32_t n) {
  Weight part = all;
  part.n = n;
  part.data = static_cast<const char*>(all.data) + block * packed_bytes(all.kind, kBlock, all.k);
  if (all.scales != nullptr)
    part.scales = reinterpret_cast<const float*>(reinterpret_cast<const char*>(all.scales) +
                                                 block * scale_bytes(all));
  return part;
}

// The top_k best of n logits, best first, of equals the first, and their probabilities. A NaN makes
// all shares NaN.
void choose(const Experts& experts, const float* logits, int32_t* chosen, float* shares) {
  const int32_t n = experts.num_experts, k = experts.top_k;
  int32_t count = 0;
  for (int32_t e = 0; e < n; ++e) {
    if (count == k && !(logits[e] > logits[chosen[k - 1]])) continue;
    int32_t at = count < k ? count++ : k - 1;
    for (; at > 0 && logits[e] > logits[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
    chosen[at] = e;
  }
  const float top = logits[chosen[0]];
  float sum = 0.0f;
  for (int32_t e = 0; e < n; ++e) sum += std::exp(logits[e] - top);
  float taken = 0.0f;
  for (int32_t i = 0; i < k; ++i) {
    shares[i] = std::exp(logits[chosen[i]] - top) / sum;
    taken += shares[i];
  }
  for (int32_t i = 0; experts.normalise && i < k; ++i) shares[i] /= taken;
}

// y = (or +=) the sum of shares[i] * rows[places[i]], of n numbers each, in the order of i.
void add_up(const float* rows, const int32_t* places, const float* shares, int32_t count,
            int32_t n, float* y, Epilogue how) {
  float sums[kSumColumns];
  for (int32_t begin = 0; begin < n; begin += kSumColumns) {
    const int32_t size = std::min(n - begin, kSumColumns);
    for (int32_t i = 0; i < count; ++i) {
      const float share = shares[i];
      const float* part = rows + int64_t{places[i]} * n + begin;
      if (i == 0)
        for (int32_t c = 0; c < size; ++c) sums[c] = share * part[c];
      else
        for (int32_t c = 0; c < size; ++c) sums[c] += share * part[c];
    }
    float* to = y + begin;
    for (int32_t c = 0; c < size; ++c) to[c] = how == kAdd ? to[c] + sums[c] : sums[c];
  }
}

}  // namespace

bool slots_exist(const Experts& experts) {
  return std::all_of(experts.slots, experts.slots + experts.num_experts,
                     [&](int64_t slot) { return slot >= 0 && slot < experts.num_slots; });
}

ExpertPass::Scratch ExpertPass::cut(const Experts& experts, int32_t rows, int32_t num_threads,
                                    int thread, char* scratch) {
  const int64_t choices = int64_t{rows} * experts.top_k;
  const int32_t most = static_cast<int32_t>(std::min<int64_t>(choices, kExpertRows));
  const int64_t stretches = std::min<int64_t>(choices, experts.num_slots) + choices / kExpertRows;
  char* at = scratch;
  const auto take = [&at](int64_t bytes) {
    char* taken = at;
    at += aligned(bytes);
    return taken;
  };
  Scratch found{};
  found.logits = reinterpret_cast<float*>(take(int64_t{rows} * experts.num_experts * 4));
  found.shares = reinterpret_cast<float*>(take(choices * 4));
  found.chosen = reinterpret_cast<int32_t*>(take(choices * 4));
  found.places = reinterpret_cast<int32_t*>(take(choices * 4));
  found.sources = reinterpret_cast<int32_t*>(take(choices * 4));
  found.begins = reinterpret_cast<int32_t*>(take((experts.num_slots + int64_t{1}) * 4));
  found.num_stretches = reinterpret_cast<int32_t*>(take(4));
  found.stretches = reinterpret_cast<Stretch*>(take(stretches * int64_t{sizeof(Stretch)}));
  found.sorted = reinterpret_cast<float*>(take(choices * experts.hidden * 4));
  found.wide = reinterpret_cast<float*>(take(choices * experts.inner * 4));
  found.gemm = take(gemm_scratch_bytes(experts.router.kind, rows, experts.hidden));
  const int64_t own = aligned(std::max(
      gemm_scratch_bytes(experts.gate_up.kind, most, experts.hidden),
      gemm_scratch_bytes(experts.down.kind, most, experts.inner)));
  found.own_gemm = take(own * num_threads) + own * thread;
  found.num_bytes = at - scratch;
  return found;
}

int64_t experts_scratch_bytes(const Experts& experts, int32_t rows, int32_t num_threads) {
  return ExpertPass::cut(experts, rows, num_threads, 0, nullptr).num_bytes;
}

ExpertPass::ExpertPass(Team& team, int thread, const Experts& experts, const float* x,
                       int32_t rows, char* scratch)
    : team_(team),
      thread_(thread),
      experts_(experts),
      x_(x),
      rows_(rows),
      scratch_(cut(experts, rows, team.size(), thread, scratch)) {}

void ExpertPass::route() {
  const int32_t k = experts_.top_k, hidden = experts_.hidden;
  gemm(team_, thread_, experts_.router, x_, hidden, rows_, scratch_.logits, experts_.num_experts,
       kStore, scratch_.gemm);
  for (int64_t row = team_.claim(); row < rows_; row = team_.claim())
    choose(experts_, scratch_.logits + row * experts_.num_experts, scratch_.chosen + row * k,
           scratch_.shares + row * k);
  team_.barrier();
  if (thread_ == 0) sort();
  team_.barrier();
  const int64_t choices = int64_t{rows_} * k;
  for (int64_t c = team_.claim(); c < choices; c = team_.claim())
    std::memcpy(scratch_.sorted + c * hidden, x_ + int64_t{scratch_.sources[c]} * hidden,
                static_cast<size_t>(hidden) * 4);
  team_.barrier();
}

// A counting sort by slots, equal ones in the order of rows; and the stretches.
void ExpertPass::sort() {
  const int32_t choices = rows_ * experts_.top_k, num_slots = experts_.num_slots;
  int32_t* begins = scratch_.begins;
  std::fill_n(begins, num_slots + 1, 0);
  for (int32_t c = 0; c < choices; ++c) {
    ++experts_.counts[scratch_.chosen[c]];
    ++begins[experts_.slots[scratch_.chosen[c]] + 1];
  }
  int32_t found = 0;
  for (int32_t slot = 0; slot < num_slots; ++slot) {
    const int32_t first = begins[slot], end = first + begins[slot + 1];
    begins[slot + 1] = end;
    for (int32_t row = first; row < end; row += kExpertRows)
      scratch_.stretches[found++] = {slot, row, std::min(end - row, kExpertRows)};
  }
  *scratch_.num_stretches = found;
  for (int32_t c = 0; c < choices; ++c) {
    const int32_t place = begins[experts_.slots[scratch_.chosen[c]]]++;
    scratch_.places[c] = place;
    scratch_.sources[place] = c / experts_.top_k;
  }
}

// Each stretch's product with the weights of its slot, shared out among the threads by stretches
// and pieces of the outputs. Which piece an output is in changes no bit of it, so each piece is a
// product of one thread, without barriers between the experts.
void ExpertPass::multiply(const Weight& all, const float* x, float* y, Epilogue epilogue) {
  const int32_t width = epilogue == kSiluMul ? experts_.inner : experts_.hidden;
  const int64_t step = epilogue == kSiluMul ? 2 : 1;  // blocks that give 16 outputs
  const int64_t units = (width + kBlock - 1) / kBlock;
  const int64_t stretches = *scratch_.num_stretches;
  const int64_t fair = stretches * units / (team_.size() * kClaims) + 1;
  const int64_t per_claim = std::min(fair, kMostBlocks / step);
  const int64_t claims = (units + per_claim - 1) / per_claim;
  Team alone(1);
  for (int64_t c = team_.claim(); c < stretches * claims; c = team_.claim()) {
    const Stretch& stretch = scratch_.stretches[c / claims];
    const int64_t unit = c % claims * per_claim;
    const int64_t first = unit * kBlock, end = std::min<int64_t>(first + per_claim * kBlock, width);
    const Weight part = part_of(all, (stretch.slot * units + unit) * step,
                                static_cast<int32_t>((end - first) * step));
    gemm(alone, 0, part, x + int64_t{stretch.first} * all.k, all.k, stretch.count,
         y + int64_t{stretch.first} * width + first, width, epilogue, scratch_.own_gemm);
    team_.tick();
  }
  team_.barrier();
}

void ExpertPass::gate_up() {
  multiply(experts_.gate_up, scratch_.sorted, scratch_.wide, kSiluMul);
}

void ExpertPass::down(float* y, Epilogue how) {
  const int32_t k = experts_.top_k, hidden = experts_.hidden;
  multiply(experts_.down, scratch_.wide, scratch_.sorted, kStore);
  for (int64_t row = team_.claim(); row < rows_; row = team_.claim())
    add_up(scratch_.sorted, scratch_.places + row * k, scratch_.shares + row * k, k, hidden,
           y + row * hidden, how);
  team_.barrier();
}

}  // namespace xk
