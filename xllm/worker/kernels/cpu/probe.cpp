#include "probe.h"

#include <atomic>

#include <chrono>

#include "variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xk {
namespace {

constexpr int64_t kPiece = 128 << 10;
constexpr int kChains = 12;      // independent sums: more than latency times ports
constexpr int kRounds = 20000;   // between two looks at the clock

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

typedef uint64_t Word __attribute__((vector_size(64), may_alias));

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t read_avx512(const char* from, int64_t bytes) {
  Word sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    __builtin_prefetch(from + i + 4096, 0, 2);
    __builtin_prefetch(from + i + 4096 + 64, 0, 2);
    __builtin_prefetch(from + i + 4096 + 128, 0, 2);
    __builtin_prefetch(from + i + 4096 + 192, 0, 2);
    for (int j = 0; j < 4; ++j) sums[j] ^= *reinterpret_cast<const Word*>(from + i + 64 * j);
  }
  const Word all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return all[0] ^ all[7];
}
#endif

uint64_t read_plain(const char* from, int64_t bytes) {
  typedef uint64_t Pair __attribute__((vector_size(16), may_alias));
  Pair sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 64)
    for (int j = 0; j < 4; ++j) sums[j] ^= *reinterpret_cast<const Pair*>(from + i + 16 * j);
  const Pair all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return all[0] ^ all[1];
}

struct Reading {
  Team& team;
  const char* memory;
  int64_t pieces;
  std::atomic<uint64_t> seen{0};
};

void read_pieces(void* argument, int) {
  Reading& r = *static_cast<Reading*>(argument);
  uint64_t seen = 0;
  for (int64_t p = r.team.claim(); p < r.pieces; p = r.team.claim()) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
      seen ^= read_avx512(r.memory + p * kPiece, kPiece);
      continue;
    }
#endif
    seen ^= read_plain(r.memory + p * kPiece, kPiece);
  }
  r.seen.fetch_xor(seen, std::memory_order_relaxed);
}

// Rounds of kChains multiply-adds; what they take is kept opaque so that nothing is computed away.
// Each sum is a variable of its own: GCC leaves an array in memory here, and would measure that.
#define XK_EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define XK_DECLARE(c) auto sum##c = zero;
#define XK_STEP(c) asm("" : "+" XK_REGISTER(sum##c), "+" XK_REGISTER(w)); sum##c = XK_MAC(sum##c);
#define XK_USE(c) asm volatile("" : : XK_REGISTER(sum##c));
#define XK_PEAK(NAME, TARGET, PART, ZERO, FLOPS)             \
  TARGET double NAME(int rounds) {                           \
    const PART zero = ZERO;                                  \
    PART w = zero, x = zero;                                 \
    asm volatile("" : "+" XK_REGISTER(w), "+" XK_REGISTER(x)); \
    XK_EACH(XK_DECLARE)                                      \
    for (int i = 0; i < rounds; ++i) {                       \
      XK_EACH(XK_STEP)                                       \
    }                                                        \
    XK_EACH(XK_USE)                                          \
    return static_cast<double>(rounds) * kChains * (FLOPS);  \
  }
#if defined(__x86_64__)
#define XK_REGISTER(value) "v"(value)
#define XK_MAC(sum) _mm512_fmadd_ps(w, x, sum)
XK_PEAK(peak_avx512, __attribute__((target("avx512f"))), __m512, _mm512_setzero_ps(), 32)
#undef XK_MAC
#define XK_MAC(sum) \
  _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))
XK_PEAK(peak_bf16, __attribute__((target("avx512f,avx512bf16"))), __m512, _mm512_setzero_ps(), 64)
#undef XK_MAC
#undef XK_REGISTER
#define XK_REGISTER(value) "x"(value)
#define XK_MAC(sum) _mm256_fmadd_ps(w, x, sum)
XK_PEAK(peak_avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_setzero_ps(), 16)
#undef XK_MAC
#undef XK_REGISTER
#endif

typedef float Floats __attribute__((vector_size(16)));
#if defined(__x86_64__)
#define XK_REGISTER(value) "x"(value)
#else
#define XK_REGISTER(value) "m"(value)
#endif
#define XK_MAC(sum) sum + w * x
XK_PEAK(peak_portable, , Floats, Floats{}, 8)
#undef XK_MAC
#undef XK_REGISTER

using Peak = double (*)(int);

Peak peak_of(int32_t variant) {
#if defined(__x86_64__)
  if (variant >= kAvx512Bf16) return peak_bf16;
  if (variant == kAvx512) return peak_avx512;
  if (variant == kAvx2) return peak_avx2;
#endif
  return peak_portable;
}

struct Peaking {
  Peak peak;
  double seconds;
  std::atomic<double> rate{0.0};
};

void reach_peak(void* argument, int) {
  Peaking& p = *static_cast<Peaking*>(argument);
  const double start = now();
  double done = 0.0, passed = 0.0;
  while (passed < p.seconds) {
    done += p.peak(kRounds);
    passed = now() - start;
  }
  p.rate.fetch_add(done / passed);
}

}  // namespace

double read_bandwidth(Team& team, const void* memory, int64_t bytes) {
  Reading reading{team, static_cast<const char*>(memory), bytes / kPiece, {}};
  const double start = now();
  team.run(read_pieces, &reading);
  return static_cast<double>(reading.pieces * kPiece) / (now() - start);
}

double product_peak(Team& team, int32_t variant, double seconds) {
  const bool usable = variant > kAuto && variant < num_variants() &&
                      variant_state(variant) == kUsable;
  Peaking peaking{peak_of(usable ? variant : best_variant()), seconds, {}};
  team.run(reach_peak, &peaking);
  return peaking.rate.load();
}

}  // namespace xk
