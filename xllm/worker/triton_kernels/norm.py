"""Root-mean-square norm, with the sum of the residual in the same pass, as layers.norm rounds.

A row is read once and kept in registers between its mean and its scaling: a norm costs what
moving its rows costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.triton_kernels.launching import check_contiguous
from xllm.worker.triton_kernels.tiling import power_of_two


@triton.jit
def norm_kernel(x, residual, weight, out, columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """See add_rms_norm. Grid: (rows)."""
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, BLOCK)
    real = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    row = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(residual + place, mask=real, other=0.0).to(tl.float32)
        rounded = row.to(dtype)
        tl.store(residual + place, rounded, mask=real)
        row = rounded.to(tl.float32)
    root = tl.sqrt_rn(tl.sum(row * row, 0) / columns + eps)
    # Rounded before the weight is applied, as the models were trained.
    normed = (row / root).to(dtype).to(tl.float32)
    scaled = normed * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, scaled.to(dtype), mask=real)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds `x` [rows, hidden] to `residual` in place and gives its norm: residual / rms(residual)
    * `weight` [hidden], mean and sum in fp32."""
    check_contiguous(x=x, residual=residual, weight=weight)
    return _launch(x, residual, weight, eps, add=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * `weight` [hidden] of `x` [rows, hidden], the mean in fp32."""
    check_contiguous(x=x, weight=weight)
    return _launch(x, x, weight, eps, add=False)


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, add: bool
) -> torch.Tensor:
    rows, columns = x.shape
    out = torch.empty_like(x)
    if rows:
        block = power_of_two(columns, 16)
        # 8 to 16 numbers a thread: one or two loads of 16 bytes each.
        num_warps = min(max(block // 512, 1), 16)
        norm_kernel[(rows,)](
            x, residual, weight, out, columns, eps, add, block, num_warps=num_warps
        )
    return out
