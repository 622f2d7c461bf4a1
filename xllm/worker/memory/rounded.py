"""Keys and values rounded to 8 bits, with a scale for each token and head.

The compiled kernels write the same bits (rows_body.h).
"""

from __future__ import annotations

import torch

from xllm.worker.memory.block_layout import BlockLayout

SCALE_BYTES = 4
"""Of a float32."""

_MOST = 127.0
_TINY = 1e-30


def round_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, heads, dim] to int8, and scales [rows, heads] float32: their product is near x. A
    scale is NaN where a number is not finite."""
    x = x.float()
    top = x.abs().amax(-1)
    usual = (top >= _TINY) & top.isfinite()
    factor = torch.where(usual, torch.tensor(_MOST) / top, 0.0)
    numbers = torch.where(usual[..., None], x * factor[..., None], 0.0).round().to(torch.int8)
    return numbers, torch.where(usual, top / _MOST, torch.where(top < _TINY, 0.0, torch.nan))


def scale_views(flat: torch.Tensor, layout: BlockLayout) -> list[torch.Tensor]:
    """Of each layer [num_blocks, keys | values, kv_heads, block_size] float32 over a memory's
    bytes."""
    floats = flat.view(torch.float32)
    heads, size = layout.num_kv_heads, layout.block_size
    shape = (layout.num_blocks, 2, heads, size)
    strides = (layout.block_bytes // SCALE_BYTES, heads * size, size, 1)
    first, step = 2 * layout.key_bytes // SCALE_BYTES, layout.layer_bytes // SCALE_BYTES
    starts = range(first, first + step * layout.num_layers, step)
    return [floats.as_strided(shape, strides, start) for start in starts]
