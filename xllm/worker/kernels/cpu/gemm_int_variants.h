// The variants of quantized products: one file each, chosen by gemm_int.cpp.
#pragma once

#include "gemm_variants.h"

namespace xk {

void gemm_int_portable(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                       Epilogue, void*);
#if defined(__x86_64__)
void gemm_int_sse2(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                   Epilogue, void*);
void gemm_int_avx2(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                   Epilogue, void*);
void gemm_int_avx512(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                     Epilogue, void*);
void gemm_int_vnni(Team&, int, const Weight&, const float*, int64_t, int32_t, float*, int64_t,
                   Epilogue, void*);
#endif

}  // namespace xk
