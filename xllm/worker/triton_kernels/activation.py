"""The gate of an MLP: silu(gate) * up in one pass over the product of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.triton_kernels.launching import check_contiguous

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up, out, columns, BLOCK: tl.constexpr):
    """See silu_mul. Grid: (rows, blocks of columns)."""
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < columns
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * columns + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + column, mask=real, other=0.0)
    # Rounded between, as torch's two kernels do.
    gated = (gate / (1.0 + tl.exp2(gate * -1.4426950408889634))).to(dtype).to(tl.float32)
    tl.store(out + row * columns + column, (gated * up.to(tl.float32)).to(dtype), mask=real)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [rows, inner] of [rows, 2 * inner], the gate's half first. 8 numbers a
    thread, 16 bytes of each half at once."""
    check_contiguous(gate_up=gate_up)
    rows, both = gate_up.shape
    out = torch.empty((rows, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, -(-both // 2 // _BLOCK))
        silu_mul_kernel[grid](gate_up, out, both // 2, _BLOCK, num_warps=4)
    return out
