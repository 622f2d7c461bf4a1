// What the machine can do, measured here and now: the bounds that figures are held against.
#pragma once

#include <cstdint>

#include "team.h"

namespace xk {

// Bytes a second that all threads together read, once through `memory` (much larger than the
// caches; aligned to 64 bytes).
double read_bandwidth(Team& team, const void* memory, int64_t bytes);

// Floating-point operations a second of all threads with everything in registers: fused
// multiply-adds of the variant (bfloat16 pairs for avx512-bf16), for about `seconds`.
double product_peak(Team& team, int32_t variant, double seconds);

}  // namespace xk
