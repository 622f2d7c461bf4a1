// A team of threads that computes one thing together: no queue, no futures.
//
// The caller is thread 0 of every run; the others spin for a moment between runs (a step is many
// runs close together) and then sleep, so that an idle engine costs nothing and does not take a
// core from the processes beside it. Inside a run the threads meet at barriers and claim work from
// one counter, which each barrier resets: a thread that loses its core for a while is helped out
// by the others. Who claims what never changes a result: see gemm.h and attention.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace xk {

class Team {
 public:
  using Work = void (*)(void* argument, int thread);

  explicit Team(int num_threads);  // throws where the system gives no more threads
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }

  // Runs work(argument, t) on every thread t and returns when all have returned. One caller at a
  // time.
  void run(Work work, void* argument);

  // Inside a run: waits for all threads; the claim counter starts at 0 again behind it.
  void barrier();

  // Inside a run: the next unclaimed number since the last barrier.
  int64_t claim() { return claimed_.fetch_add(1, std::memory_order_relaxed); }

  // The progress counter of the engine: bounded pieces of work done, read by another thread.
  void tick() { progress_.fetch_add(1, std::memory_order_relaxed); }
  const std::atomic<int64_t>& progress() const { return progress_; }

 private:
  void serve(int thread);
  void end();

  const int num_threads_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<int32_t> run_{0};      // number of the current run; -1 ends the threads
  alignas(64) std::atomic<int32_t> num_left_{0};  // threads that have not finished the run
  alignas(64) std::atomic<int32_t> num_arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  alignas(64) std::atomic<int64_t> claimed_{0};
  alignas(64) std::atomic<int64_t> progress_{0};
  Work work_ = nullptr;
  void* argument_ = nullptr;
};

}  // namespace xk
