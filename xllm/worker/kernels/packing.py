"""The packed forms of weights, in torch: what pack.cpp writes and gemm.h describes.

Blocks of 16 outputs, zero padded. BF16: pairs of inputs together, [n/16, k/2, 16, 2]. FP32:
[n/16, k, 16].
"""

from __future__ import annotations

from enum import IntEnum

import torch

BLOCK = 16


class Kind(IntEnum):
    """`xk::Kind`."""

    BF16 = 0
    FP32 = 1
    INT8 = 2  # these three: integers.py
    INT4 = 3
    W8A8 = 4


def num_blocks(num_outputs: int) -> int:
    """Blocks of 16 that hold so many outputs."""
    return -(-num_outputs // BLOCK)


def packed_shape(kind: Kind, blocks: int, num_inputs: int) -> tuple[int, ...]:
    """The shape of packed weights."""
    if kind == Kind.FP32:
        return (blocks, num_inputs, BLOCK)
    return (blocks, -(-num_inputs // 2), BLOCK, 2)


def packed_dtype(kind: Kind) -> torch.dtype:
    """The element type of packed weights."""
    return torch.float32 if kind == Kind.FP32 else torch.bfloat16


def pack(kind: Kind, source: torch.Tensor) -> torch.Tensor:
    """[rows, inputs] of any floating type to blocks."""
    rows, num_inputs = source.shape
    blocks = num_blocks(rows)
    inputs = num_inputs + num_inputs % 2 if kind == Kind.BF16 else num_inputs
    padded = torch.zeros(blocks * BLOCK, inputs, dtype=packed_dtype(kind))
    padded[:rows, :num_inputs] = source
    if kind == Kind.FP32:
        return padded.view(blocks, BLOCK, inputs).transpose(1, 2).contiguous()
    return padded.view(blocks, BLOCK, inputs // 2, 2).transpose(1, 2).contiguous()


def unpack(kind: Kind, packed: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """Blocks back to float32 [16 * blocks, num_inputs]."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * BLOCK, -1)
    return rows[:, :num_inputs].float()
