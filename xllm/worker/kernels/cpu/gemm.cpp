// Chooses the variant of a product, and checks each against the portable one before it is used.
#include "gemm.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "gemm_int.h"
#include "gemm_variants.h"
#include "pack.h"
#include "variant.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xk {
namespace {

constexpr int kAmxRows = 16;       // from so many rows on AMX is used in kAuto
constexpr int kScratchRows = 32;   // rows are padded to, at most

struct Entry {
  const char* name;
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

bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives the tile registers to a process that asks for them.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

constexpr Entry kEntries[] = {
    {"auto", nullptr, always},
    {"portable", gemm_portable, always},
#if defined(__x86_64__)
    {"avx2", gemm_avx2, has_avx2},
    {"avx512", gemm_avx512, has_avx512},
    {"avx512-bf16", gemm_bf16, has_bf16},
    {"amx", gemm_amx, has_amx},
#endif
};
constexpr int kNumEntries = sizeof(kEntries) / sizeof(kEntries[0]);

struct Values {
  uint32_t state = 1;
  float next() {  // in (-1, 1), exact in bfloat16
    state = state * 1664525u + 1013904223u;
    return (static_cast<int32_t>(state >> 24) - 128) / 128.0f;
  }
};

struct Product {
  Team* team;
  Gemm gemm;
  Weight weight;
  const float* x;
  int32_t rows;
  float* y;
  Epilogue epilogue;
  void* scratch;
};

void run_product(void* argument, int thread) {
  const Product& p = *static_cast<Product*>(argument);
  const int64_t ldy = p.epilogue == kSiluMul ? p.weight.n / 2 : p.weight.n;
  p.gemm(*p.team, thread, p.weight, p.x, p.weight.k, p.rows, p.y, ldy, p.epilogue, p.scratch);
}

// One product by a variant and by the portable one; true where they agree within rounding.
bool agrees(Team& team, Gemm gemm, int32_t kind, int32_t rows, int32_t n, int32_t k,
            Epilogue epilogue) {
  Values values;
  std::vector<float> source(static_cast<size_t>(n) * k), x(static_cast<size_t>(rows) * k);
  for (float& value : source) value = values.next();
  for (float& value : x) value = values.next();
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const int64_t bytes = (packed_bytes(kind, n + 32, k) + 63) / 64 * 64;
  std::unique_ptr<void, Free> data(std::aligned_alloc(64, bytes));
  const int64_t scratch_bytes = (gemm_scratch_bytes(kind, rows, k) + 63) / 64 * 64;
  std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, scratch_bytes));
  std::memset(data.get(), 0, bytes);
  pack_rows(kind, source.data(), kFromFp32, n, k, k, data.get(), 0, (n + 15) / 16);
  std::vector<float> bias(static_cast<size_t>(n) + 32, 0.5f);
  const Weight weight{kind, n, k, 0, data.get(), nullptr, bias.data(), kAuto};
  std::vector<float> expected(static_cast<size_t>(rows) * n, 1.0f), got(expected);
  Product product{&team, gemm_portable, weight, x.data(), rows, expected.data(), epilogue,
                  scratch.get()};
  team.run(run_product, &product);
  product.gemm = gemm;
  product.y = got.data();
  team.run(run_product, &product);
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(got[i] - expected[i]) <= 1e-4f * (1.0f + std::fabs(expected[i])))) return false;
  return true;
}

bool passes(Gemm gemm) {
  struct Shape {
    int32_t rows, n, k;
  };
  Team team(1);
  for (const Shape& s : {Shape{1, 48, 37}, Shape{3, 64, 64}, Shape{7, 32, 130}, Shape{19, 96, 66},
                         Shape{33, 64, 2080}})
    for (const int32_t kind : {kBf16, kFp32})
      for (const Epilogue epilogue : {kStore, kAdd, kSiluMul})
        if (!agrees(team, gemm, kind, s.rows, s.n, s.k, epilogue)) return false;
  return true;
}

struct Found {
  VariantState states[kNumEntries];
  int best = 1;        // of those that serve all row counts
  bool amx = false;
  Found() {
    for (int i = 0; i < kNumEntries; ++i) {
      const bool here = kEntries[i].runs_here();
      const bool right = here && (i <= kPortable || passes(kEntries[i].gemm));
      states[i] = !here ? kNotHere : right ? kUsable : kWrong;
      if (right && i < kAmx) best = i > 0 ? i : best;
      if (right && i == kAmx) amx = true;
    }
  }
};

const Found& found() {
  static const Found found;  // checked once, at load
  return found;
}

Gemm gemm_of(const Weight& weight, int32_t rows) {
  const Found& f = found();
  int variant = weight.variant;
  if (variant == kAuto) {
    variant = f.amx && weight.kind == kBf16 && rows >= kAmxRows ? kAmx : f.best;
  } else if (variant >= kNumEntries || f.states[variant] != kUsable) {
    variant = f.best;
  }
  return kEntries[variant].gemm;
}

}  // namespace

int num_variants() { return kNumEntries; }
const char* variant_name(int variant) { return kEntries[variant].name; }
VariantState variant_state(int variant) { return found().states[variant]; }
int best_variant() { return found().best; }

int64_t gemm_scratch_bytes(int32_t, int32_t rows, int32_t k) {
  const int64_t padded_rows = (static_cast<int64_t>(rows) + kScratchRows - 1) / kScratchRows * kScratchRows;
  return padded_rows * ((static_cast<int64_t>(k) + 63) / 64 * 64) * 4;
}

void gemm(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx, int32_t rows,
          float* y, int64_t ldy, Epilogue epilogue, void* scratch) {
  if (is_integer(weight.kind)) {
    gemm_int(team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch);
    return;
  }
  gemm_of(weight, rows)(team, thread, weight, x, ldx, rows, y, ldy, epilogue, scratch);
}

}  // namespace xk
