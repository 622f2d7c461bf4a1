#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xk {
namespace {

constexpr int kSpins = 4000;  // some 50 us: longer than the gap between two runs of a step

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // as long as a pause of x86; a yield is nothing on most cores
#endif
}

void wait_while(const std::atomic<int32_t>& value, int32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
  try {
    for (int thread = 1; thread < num_threads_; ++thread)
      threads_.emplace_back([this, thread] { serve(thread); });
  } catch (...) {
    end();
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  run_.store(-1, std::memory_order_release);
  run_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(Work work, void* argument) {
  work_ = work;
  argument_ = argument;
  claimed_.store(0, std::memory_order_relaxed);
  num_left_.store(num_threads_ - 1, std::memory_order_relaxed);
  // Runs are counted up to where the sign would turn; -1 stays the end.
  run_.store((run_.load(std::memory_order_relaxed) + 1) & 0x7fffffff, std::memory_order_release);
  if (num_threads_ > 1) run_.notify_all();
  work(argument, 0);
  for (;;) {
    const int32_t left = num_left_.load(std::memory_order_acquire);
    if (left == 0) return;
    wait_while(num_left_, left);
  }
}

void Team::barrier() {
  if (num_threads_ == 1) {
    claimed_.store(0, std::memory_order_relaxed);
    return;
  }
  const int32_t phase = phase_.load(std::memory_order_relaxed);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    num_arrived_.store(0, std::memory_order_relaxed);
    claimed_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_while(phase_, phase);
  }
}

void Team::serve(int thread) {
  int32_t seen = 0;
  for (;;) {
    wait_while(run_, seen);
    seen = run_.load(std::memory_order_acquire);
    if (seen == -1) return;
    work_(argument_, thread);
    if (num_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_left_.notify_all();
  }
}

}  // namespace xk
