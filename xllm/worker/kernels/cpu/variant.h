// Variants of the kernels: what this CPU has, what passed its check.
#pragma once

#include <cstdint>

namespace xk {

enum Variant : int32_t {
  kAuto = 0,  // the best: may differ between row counts
  kPortable = 1,
  kAvx2 = 2,
  kAvx512 = 3,
  kAvx512Bf16 = 4,
  kAmx = 5,
};

enum VariantState : int32_t {
  kNotHere = 0,
  kUsable = 1,
  kWrong = 2,  // disagreed with the portable variant at load and is never used
};

int num_variants();
const char* variant_name(int variant);
VariantState variant_state(int variant);
int best_variant();  // the best that serves all row counts with the same bits

}  // namespace xk
