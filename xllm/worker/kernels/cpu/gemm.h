// Products of activations with packed weights: y = x W^T (+ bias), for 1 to many rows.
//
// Invariant: y[r][o] is accumulated over k in an order that depends on neither the number of rows
// nor the tiling nor the threads; the same row gives the same bits in every batch.
#pragma once

#include <cstdint>

#include "team.h"
#include "variant.h"

namespace xk {

enum Kind : int32_t {
  kBf16 = 0,  // [n/16][k/2][16][2] bfloat16
  kFp32 = 1,  // [n/16][k][16] float
  kInt8 = 2,  // weight-only, a scale for each output
  kInt4 = 3,  // weight-only, a scale for each output and group of k
  kW8A8 = 4,  // int8 weights and dynamically quantized rows
};

enum Epilogue : int32_t {
  kStore = 0,    // y = product
  kAdd = 1,      // y += product (the residual stream)
  kSiluMul = 2,  // blocks of 16 gates and 16 ups alternate: y[n/2] = silu(gate) * up
};

// A packed weight of n outputs and k inputs as the caller counts them; the packed form is padded
// with zeros to whole blocks. For kSiluMul n counts gates and ups together.
struct Weight {
  int32_t kind;
  int32_t n;
  int32_t k;
  int32_t group;        // kInt4: inputs that share a scale
  const void* data;     // aligned to 64 bytes
  const float* scales;  // kInt8, kW8A8: a value for each packed output; kInt4: [n/16][k/group][16]
  const float* bias;    // a value for each packed output, padding included, or null
  int32_t variant = kAuto;  // forces a variant where it is usable; best_variant() gives a row the
                            // same bits at every row count, kAuto may not
};

// Scratch of a team: enough for `rows` rows of `k` inputs in the type a kernel wants them.
int64_t gemm_scratch_bytes(int32_t kind, int32_t rows, int32_t k);

// Called by every thread of a run with the same arguments. x [rows, k] with row stride ldx, y with
// row stride ldy, both float and finished before the call: a barrier (or the start of the run)
// stands behind who wrote them, and nobody has claimed since. Ends with a barrier: y is complete
// for all threads. scratch: gemm_scratch_bytes, aligned to 64 bytes, one for the team.
void gemm(Team& team, int thread, const Weight& weight, const float* x, int64_t ldx, int32_t rows,
          float* y, int64_t ldy, Epilogue epilogue, void* scratch);

}  // namespace xk
