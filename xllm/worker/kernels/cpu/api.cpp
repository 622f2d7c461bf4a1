// The C interface that compiled.py loads: plain pointers and integers, nothing thrown.
//
// Raise kAbi with every change of a signature or a structure; compiled.py refuses another number.
#include <sys/mman.h>

#include <cstdint>

#include "gemm_int.h"
#include "pack.h"
#include "probe.h"
#include "team.h"
#include "variant.h"

#define XK_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kAbi = 6;
constexpr size_t kHugePage = size_t{2} << 20;

struct ProductCall {
  xk::Team* team;
  const xk::Weight* weight;
  const float* x;
  int64_t ldx;
  int32_t rows;
  float* y;
  int64_t ldy;
  xk::Epilogue epilogue;
  void* scratch;
};

struct PackCall {
  xk::Team* team;
  int32_t kind;
  const void* source;
  xk::SourceType type;
  int64_t rows;
  int32_t k;
  int64_t ld;
  char* packed;
  int64_t stride;
  // Of quantized kinds:
  int32_t group = 0;
  void* scales = nullptr;
  int64_t first_block = 0;
};

void run_product(void* argument, int thread) {
  const ProductCall& c = *static_cast<ProductCall*>(argument);
  xk::gemm(*c.team, thread, *c.weight, c.x, c.ldx, c.rows, c.y, c.ldy, c.epilogue, c.scratch);
}

void run_pack(void* argument, int) {
  const PackCall& c = *static_cast<PackCall*>(argument);
  const int64_t blocks = (c.rows + 15) / 16;
  for (int64_t b = c.team->claim(); b < blocks; b = c.team->claim()) {
    if (c.scales != nullptr)
      xk::pack_int_rows(c.kind, c.group, c.source, c.type, c.rows, c.k, c.ld, c.packed, c.scales, b,
                        b + 1, c.first_block, c.stride);
    else
      xk::pack_rows(c.kind, c.source, c.type, c.rows, c.k, c.ld, c.packed, b, b + 1, c.stride);
  }
}

}  // namespace

XK_API int32_t xk_abi() { return kAbi; }

XK_API int32_t xk_num_variants() { return xk::num_variants(); }
XK_API const char* xk_variant_name(int32_t variant) { return xk::variant_name(variant); }
XK_API int32_t xk_variant_state(int32_t variant) { return xk::variant_state(variant); }
XK_API int32_t xk_best_variant() { return xk::best_variant(); }

// Null where the system gives no more threads.
XK_API void* xk_team_new(int32_t num_threads) {
  try {
    return new xk::Team(num_threads);
  } catch (...) {
    return nullptr;
  }
}
XK_API void xk_team_free(void* team) { delete static_cast<xk::Team*>(team); }
// The address of the counter of bounded pieces of work, an int64 that other threads may read.
XK_API const void* xk_team_progress(void* team) {
  return &static_cast<xk::Team*>(team)->progress();
}

// Zeroed memory of whole pages, in huge pages where the kernel has them; null where there is none.
XK_API void* xk_allocate(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes);
  const size_t slack = size >= 2 * kHugePage ? kHugePage : 0;
  void* found = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
  if (found == MAP_FAILED) return nullptr;
  if (slack == 0) return found;
  char* start = static_cast<char*>(found);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (head > 0) munmap(start, head);
  if (slack > head) {
    const size_t end = (head + size + 4095) / 4096 * 4096;
    if (size + slack > end) munmap(start + end, size + slack - end);
  }
  madvise(start + head, size, MADV_HUGEPAGE);
  return start + head;
}
XK_API void xk_free(void* memory, int64_t bytes) { munmap(memory, static_cast<size_t>(bytes)); }

XK_API int64_t xk_packed_bytes(int32_t kind, int64_t n, int32_t k) {
  return xk::packed_bytes(kind, n, k);
}
// Blocks of 16 rows of the source, row-major with `ld` elements from row to row: block b goes to
// block first_block + stride * b of `packed`.
XK_API void xk_pack(void* team, int32_t kind, const void* source, int32_t type, int64_t rows,
                    int32_t k, int64_t ld, void* packed, int64_t first_block, int64_t stride) {
  xk::Team& t = *static_cast<xk::Team*>(team);
  char* to = static_cast<char*>(packed) + first_block * xk::packed_bytes(kind, 16, k);
  PackCall call{&t, kind, source, static_cast<xk::SourceType>(type), rows, k, ld, to, stride};
  t.run(run_pack, &call);
}

// As xk_pack, to integers of `group` and their scales; see gemm_int.h.
XK_API void xk_pack_integers(void* team, int32_t kind, int32_t group, const void* source,
                             int32_t type, int64_t rows, int32_t k, int64_t ld, void* packed,
                             void* scales, int64_t first_block, int64_t stride) {
  xk::Team& t = *static_cast<xk::Team*>(team);
  PackCall call{&t,     kind,  source,      static_cast<xk::SourceType>(type), rows, k, ld,
                static_cast<char*>(packed), stride, group, scales, first_block};
  t.run(run_pack, &call);
}
XK_API const char* xk_integer_variant() { return xk::int_variant_name(); }

XK_API int64_t xk_gemm_scratch_bytes(int32_t kind, int32_t rows, int32_t k) {
  return xk::gemm_scratch_bytes(kind, rows, k);
}
XK_API void xk_gemm(void* team, const xk::Weight* weight, const float* x, int64_t ldx, int32_t rows,
                    float* y, int64_t ldy, int32_t epilogue, void* scratch) {
  xk::Team& t = *static_cast<xk::Team*>(team);
  ProductCall call{&t, weight, x, ldx, rows, y, ldy, static_cast<xk::Epilogue>(epilogue), scratch};
  t.run(run_product, &call);
}

// Bytes a second that the team reads from memory, and the operations a second of its products at
// best (2 a multiply-add), measured now.
XK_API double xk_read_bandwidth(void* team, const void* memory, int64_t bytes) {
  return xk::read_bandwidth(*static_cast<xk::Team*>(team), memory, bytes);
}
XK_API double xk_product_peak(void* team, int32_t variant, double seconds) {
  return xk::product_peak(*static_cast<xk::Team*>(team), variant, seconds);
}
