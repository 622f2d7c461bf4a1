// Chooses the variant of a quantized product, and checks each against the plain one: they must give
// the same bits.
#include "gemm_int.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "gemm_int_variants.h"
#include "variant.h"

namespace xk {
namespace {

struct Entry {
  const char* name;
  int32_t variant;  // of variant.h: whose name chooses it; kAuto: only the best is
  Gemm gemm;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

constexpr int32_t kPlain = -1;  // what the others are held to

constexpr Entry kEntries[] = {
    {"plain", kPlain, gemm_int_portable, always},
#if defined(__x86_64__)
    {"portable", kPortable, gemm_int_sse2, always},
    {"avx2", kAvx2, gemm_int_avx2, has_avx2},
    {"avx512", kAvx512, gemm_int_avx512, has_avx512},
    {"avx512-vnni", kAuto, gemm_int_vnni, has_vnni},
#endif
};
constexpr int kNumEntries = sizeof(kEntries) / sizeof(kEntries[0]);

struct Product {
  Team* team;
  Gemm gemm;
  Weight weight;
  std::vector<float> x, y;
  int32_t rows;
  void* scratch;
};

void run_product(void* argument, int thread) {
  Product& p = *static_cast<Product*>(argument);
  p.gemm(*p.team, thread, p.weight, p.x.data(), p.weight.k, p.rows, p.y.data(), p.weight.n, kStore,
         p.scratch);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory take(int64_t bytes) {
  Memory memory(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
  std::memset(memory.get(), 0, static_cast<size_t>(bytes));
  return memory;
}

// One product by a variant and by the plain one; true where they agree in every bit.
bool agrees(Team& team, Gemm gemm, int32_t kind, int32_t group, int32_t rows, int32_t n,
            int32_t k) {
  uint32_t state = 1;
  const auto value = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  };
  std::vector<float> source(static_cast<size_t>(n) * k);
  for (float& number : source) number = value();
  const Memory data = take(int_packed_bytes(kind, n, k));
  const Memory scales = take((n + 15) / 16 * 16 * int_lines(k) * 4);
  const Memory scratch = take(gemm_scratch_bytes(kind, rows, k));
  pack_int_rows(kind, group, source.data(), kFromFp32, n, k, k, data.get(), scales.get(), 0,
                (n + 15) / 16, 0, 1);
  const Weight weight{kind, n, k, group, data.get(), static_cast<float*>(scales.get()), nullptr,
                      kAuto};
  Product product{&team, gemm_int_portable, weight, {}, {}, rows, scratch.get()};
  product.x.resize(static_cast<size_t>(rows) * k);
  for (float& number : product.x) number = value();
  product.y.resize(static_cast<size_t>(rows) * n);
  team.run(run_product, &product);
  const std::vector<float> expected = product.y;
  product.gemm = gemm;
  team.run(run_product, &product);
  return std::memcmp(expected.data(), product.y.data(), expected.size() * 4) == 0;
}

bool passes(Gemm gemm) {
  struct Shape {
    int32_t rows, n, k;
  };
  Team team(1);
  for (const Shape& s : {Shape{1, 64, 70}, Shape{3, 32, 260}, Shape{13, 48, 300}})
    for (const int32_t kind : {kInt8, kInt4, kW8A8})
      if (!agrees(team, gemm, kind, kind == kInt4 ? 64 : 128, s.rows, s.n, s.k)) return false;
  return true;
}

struct Found {
  bool usable[kNumEntries];
  int best = 0;
  Found() {
    for (int i = 0; i < kNumEntries; ++i) {
      usable[i] = kEntries[i].runs_here() && (i == 0 || passes(kEntries[i].gemm));
      if (usable[i]) best = i;
    }
  }
};

const Found& found() {
  static const Found found;  // checked once, at the first use
  return found;
}

}  // namespace

const char* int_variant_name() { return kEntries[found().best].name; }

void gemm_int(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
              int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  const Found& f = found();
  int chosen = f.best;
  for (int i = 0; i < kNumEntries; ++i)
    if (weight.variant != kAuto && kEntries[i].variant == weight.variant && f.usable[i]) chosen = i;
  kEntries[chosen].gemm(team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch);
}

}  // namespace xk
