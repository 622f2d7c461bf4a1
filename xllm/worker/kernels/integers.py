"""Quantized weights in torch: what pack_int.cpp writes and gemm_int.h describes, bit for bit.

INT8 and W8A8 have a scale for each output; INT4 one (bfloat16) for each output and group of 64
inputs, such that the largest magnitude of a group becomes -8. Rows of x are rounded too, each
group of inputs with a scale of its own: to 16 bits beside INT8 and INT4, to 8 beside W8A8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xllm.worker.kernels.packing import BLOCK, Kind, num_blocks

LINE = 64
"""Inputs that are packed together; a row is padded to whole lines."""

GROUPS = {Kind.INT8: 128, Kind.INT4: 64, Kind.W8A8: 128}
"""Inputs of a row of x that share a scale; with INT4 those of a weight too."""

_TINY = 1e-30
_ZERO = {Kind.INT8: 128, Kind.INT4: 8, Kind.W8A8: 128}
_MOST_INPUT = {Kind.INT8: 32639, Kind.INT4: 32639, Kind.W8A8: 127}


def num_lines(num_inputs: int) -> int:
    """Lines that hold so many inputs."""
    return -(-num_inputs // LINE)


def integer_shape(kind: Kind, blocks: int, num_inputs: int) -> tuple[int, ...]:
    """The shape of packed bytes: [blocks, lines, units, 16 outputs, 4 inputs], where a byte of
    INT4 holds two units."""
    return (blocks, num_lines(num_inputs), 8 if kind == Kind.INT4 else 16, BLOCK, 4)


def make_scales(kind: Kind, blocks: int, num_inputs: int) -> torch.Tensor:
    """Zeros: [blocks, 16] float32, INT4: [blocks, groups, 16] bfloat16."""
    if kind != Kind.INT4:
        return torch.zeros(blocks, BLOCK)
    groups = -(-num_inputs // GROUPS[kind])
    return torch.zeros(blocks, groups, BLOCK, dtype=torch.bfloat16)


def pack_integers(kind: Kind, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, inputs] of any floating type to packed bytes and scales."""
    rows, inputs = source.shape
    blocks = num_blocks(rows)
    group = GROUPS[kind] if kind == Kind.INT4 else inputs
    numbers, scales = _quantize(kind, _grouped(source.float(), group))
    width = num_lines(inputs) * LINE
    padded = torch.zeros(blocks * BLOCK, width, dtype=torch.uint8)
    padded[:rows, :inputs] = numbers.flatten(1)[:, :inputs]
    units = padded.view(blocks, BLOCK, -1, 4).transpose(1, 2)
    if kind == Kind.INT4:
        units = units[:, 0::2] | units[:, 1::2] << 4
    placed = make_scales(kind, blocks, inputs)
    by_row = F.pad(scales, (0, 0, 0, blocks * BLOCK - rows)).view(blocks, BLOCK, -1)
    placed.copy_(by_row.transpose(1, 2) if kind == Kind.INT4 else by_row[..., 0])
    return units.reshape(integer_shape(kind, blocks, inputs)), placed


def unpack_integers(
    kind: Kind, packed: torch.Tensor, scales: torch.Tensor, num_inputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers around zero [16 * blocks, inputs] (int32), and their scales [16 * blocks,
    groups] float32, one group but with INT4."""
    blocks = packed.shape[0]
    if kind == Kind.INT4:
        packed = torch.stack((packed & 15, packed >> 4), 3).flatten(2, 3)
        by_row = scales.transpose(1, 2).reshape(blocks * BLOCK, -1)
    else:
        by_row = scales.view(-1, 1)
    rows = packed.flatten(1, 2).transpose(1, 2).reshape(blocks * BLOCK, -1)
    return rows[:, :num_inputs].int() - _ZERO[kind], by_row.float()


def round_inputs(kind: Kind, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [rows, inputs] float32 to integers [rows, inputs] (int32) and scales [rows, groups].
    A group that holds a number that is not finite has the scale NaN."""
    grouped = _grouped(x, GROUPS[kind])
    top = _largest(grouped).abs()
    most = _MOST_INPUT[kind]
    usual = (top >= _TINY) & top.isfinite()
    factor = torch.where(usual, torch.tensor(float(most)) / top, 0.0)  # `most / top` rounds twice
    numbers = torch.where(usual[..., None], grouped * factor[..., None], 0.0).round().int()
    scales = torch.where(usual, top / most, torch.where(top < _TINY, 0.0, torch.nan))
    return numbers.flatten(1)[:, : x.shape[1]], scales


def multiply_integers(
    kind: Kind, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """x [rows, inputs] float32 to [rows, 16 * blocks], as the kernels do it: exact products of a
    group (float64 holds them), and groups added in their order in float32."""
    num_inputs, group = x.shape[1], GROUPS[kind]
    weights, weight_scales = unpack_integers(kind, packed, scales, num_inputs)
    numbers, row_scales = round_inputs(kind, x)
    total = torch.zeros(x.shape[0], weights.shape[0])
    for index, start in enumerate(range(0, num_inputs, group)):
        part = slice(start, start + group)
        value = (numbers[:, part].double() @ weights[:, part].double().T).float()
        value *= row_scales[:, index, None]
        if kind == Kind.INT4:
            value *= weight_scales[:, index]
        total = value if start == 0 else total + value
    return total if kind == Kind.INT4 else total * weight_scales[:, 0]


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, inputs] to [rows, groups, group], zeros behind."""
    groups = -(-rows.shape[1] // group)
    return F.pad(rows, (0, -rows.shape[1] % group)).view(rows.shape[0], groups, group)


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    """Of each group the number of the largest magnitude, the negative one of two; NaN where there
    is one."""
    bits = grouped.contiguous().view(torch.int32)
    keys = (bits & 0x7FFFFFFF).long() * 2 + (bits < 0)
    return grouped.gather(-1, keys.argmax(-1, keepdim=True)).squeeze(-1)


def _quantize(kind: Kind, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [rows, groups, group] around the kind's zero, and scales [rows, groups] float32."""
    top = _largest(grouped)
    scale = (top / -8).bfloat16().float() if kind == Kind.INT4 else top.abs() / 127
    usable = scale.isfinite() & (scale.abs() >= _TINY)
    factor = torch.where(usable, 1.0 / scale, 0.0)
    numbers = torch.where(usable[..., None], grouped * factor[..., None], 0.0).round().int()
    zero = _ZERO[kind]
    numbers = (numbers + zero).clamp_(max=2 * zero - 1).to(torch.uint8)
    lost = torch.where(scale.isfinite(), 0.0, torch.nan)
    return numbers, torch.where(usable, scale, lost)
