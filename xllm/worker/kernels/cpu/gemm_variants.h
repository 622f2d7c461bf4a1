// The variants of the products: one file each, chosen by gemm.cpp.
#pragma once

#include "gemm.h"

namespace xk {

using Gemm = void (*)(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx,
                      int32_t rows, float* y, int64_t ldy, Epilogue epilogue, void* scratch);

void gemm_portable(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                   Epilogue, void*);
#if defined(__x86_64__)
void gemm_avx2(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t, Epilogue,
               void*);
void gemm_avx512(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                 Epilogue, void*);
void gemm_bf16(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t, Epilogue,
               void*);
void gemm_amx(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t, Epilogue,
              void*);
#endif

// Blocks of 16 of a weight: gate and up of kSiluMul are padded each on their own.
inline int64_t num_blocks(const Weight& weight, Epilogue epilogue) {
  if (epilogue == kSiluMul) return 2 * ((static_cast<int64_t>(weight.n) / 2 + 15) / 16);
  return (static_cast<int64_t>(weight.n) + 15) / 16;
}

}  // namespace xk
