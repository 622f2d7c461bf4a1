#include "kernels.h"

namespace xk {

const Kernels& kernels_of(int variant) {
#if defined(__x86_64__)
  if (variant == kAuto) variant = best_variant();
  __builtin_cpu_init();
  if (variant >= kAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::kernels;
  if (variant >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace xk
