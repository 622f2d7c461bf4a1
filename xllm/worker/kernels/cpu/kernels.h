// The kernels around the products, as a table per variant; the same source compiled three times.
#pragma once

#include "attention.h"
#include "rows.h"
#include "variant.h"

namespace xk {

struct Kernels {
  AttentionKernels attention;
  RowKernels rows;
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

// The table of a variant (see variant.h; kAuto: the best), or the best below it that runs here.
const Kernels& kernels_of(int variant);

}  // namespace xk
