"""A linear map over packed weights: x W^T (+ b), fp32 in and out, by the compiled kernels or by
torch over the same packed data.

The result of a row does not depend on the other rows of the call: see gemm.h. (The twin has no
such promise.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F

from xllm.worker.kernels.compiled import CWeight
from xllm.worker.kernels.integers import (
    GROUPS,
    integer_shape,
    make_scales,
    multiply_integers,
    pack_integers,
)
from xllm.worker.kernels.packing import (
    BLOCK,
    Kind,
    num_blocks,
    pack,
    packed_dtype,
    packed_shape,
    unpack,
)
from xllm.worker.kernels.team import Team

_SOURCES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Epilogue(IntEnum):
    """What happens to the sums: `xk::Epilogue`."""

    STORE = 0
    ADD = 1  # out += product
    SILU_MUL = 2  # silu(gate) * up, of a weight packed by `pack_gate_up`


@dataclass(frozen=True)
class Part:
    """Rows [rows, inputs] of a weight, whose blocks go to first_block, first_block + stride, ..."""

    source: torch.Tensor
    first_block: int
    stride: int = 1


class PackedLinear:
    """Weights of `num_outputs` by `num_inputs`, packed; bias [num_outputs] or None. `team`
    computes; without one torch does."""

    def __init__(
        self,
        kind: Kind,
        num_outputs: int,
        num_inputs: int,
        team: Team | None,
        *,
        gated: bool = False,
        variant: int = 0,
    ) -> None:
        """Zeros, for `place`. gated: gate and up alternate by blocks and num_outputs counts both.
        variant: the number of one of the library's; 0: the team's choice (quantized products have
        the same bits in all)."""
        self.kind, self.team, self.gated = kind, team, gated
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        blocks = 2 * num_blocks(num_outputs // 2) if gated else num_blocks(num_outputs)
        self.scales = make_scales(kind, blocks, num_inputs) if kind in GROUPS else None
        if self.scales is None:
            shape, dtype = packed_shape(kind, blocks, num_inputs), packed_dtype(kind)
        else:
            shape, dtype = integer_shape(kind, blocks, num_inputs), torch.uint8
        if team is None:
            self.packed = torch.zeros(shape, dtype=dtype)
        else:
            size = team.compiled.c.xk_packed_bytes(kind, blocks * BLOCK, num_inputs)
            self.packed = team.compiled.allocate(size).view(dtype).view(shape)
        self.bias: torch.Tensor | None = None
        group = GROUPS.get(kind, 0)
        self._weight = CWeight(kind, num_outputs, num_inputs, group, self.packed.data_ptr())
        if not variant and team is not None and self.scales is None:
            variant = team.variant
        self._weight.variant = variant
        if self.scales is not None:
            self._weight.scales = self.scales.data_ptr()

    @property
    def c_weight(self) -> CWeight:
        """The weight as C++ has it; valid while this object lives."""
        return self._weight

    @property
    def num_bytes(self) -> int:
        """Of the packed weights, their scales and the bias."""
        parts = (self.packed, self.scales, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def place(self, part: Part) -> None:
        """Pack rows of a source (bfloat16, float16 or float32; each row contiguous) to their
        blocks. ValueError where they do not fit."""
        source = part.source
        blocks = num_blocks(source.shape[0])
        last = part.first_block + (blocks - 1) * part.stride
        if source.shape[1] != self.num_inputs or last >= self.packed.shape[0]:
            raise ValueError(
                f"a source of {tuple(source.shape)} does not fit {self.packed.shape[0]} blocks of"
                f" {self.num_inputs} inputs from block {part.first_block} on"
            )
        if self.team is None or source.dtype not in _SOURCES or source.stride(1) != 1:
            taken = slice(part.first_block, last + 1, part.stride)
            if self.scales is None:
                self.packed[taken] = pack(self.kind, source)
            else:
                self.packed[taken], self.scales[taken] = pack_integers(self.kind, source)
            return
        c, team = self.team.compiled.c, self.team.handle
        rows = (source.data_ptr(), _SOURCES[source.dtype], source.shape[0], self.num_inputs)
        to, where = self.packed.data_ptr(), (part.first_block, part.stride)
        if self.scales is None:
            c.xk_pack(team, self.kind, *rows, source.stride(0), to, *where)
        else:
            scales, group = self.scales.data_ptr(), GROUPS[self.kind]
            c.xk_pack_integers(team, self.kind, group, *rows, source.stride(0), to, scales, *where)

    def place_bias(self, bias: torch.Tensor, first_block: int = 0, stride: int = 1) -> None:
        """Add rows of a bias [rows] to the blocks that `place` gave to its weights."""
        if self.bias is None:
            self.bias = torch.zeros(self.packed.shape[0] * BLOCK)
            self._weight.bias = self.bias.data_ptr()
        blocks = num_blocks(bias.shape[0])
        padded = F.pad(bias.float(), (0, blocks * BLOCK - bias.shape[0])).view(blocks, BLOCK)
        last = first_block + (blocks - 1) * stride
        self.bias.view(-1, BLOCK)[first_block : last + 1 : stride] = padded

    def __call__(
        self,
        x: torch.Tensor,
        epilogue: Epilogue = Epilogue.STORE,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x float32 [rows, num_inputs] to float32 [rows, num_outputs], half as many with SILU_MUL.
        `out` is required with ADD."""
        if (epilogue == Epilogue.SILU_MUL) != self.gated:
            raise ValueError("SILU_MUL is for gated weights, and they have no other epilogue")
        if out is None:
            if epilogue == Epilogue.ADD:
                raise ValueError("ADD needs `out`")
            columns = self.num_outputs // 2 if self.gated else self.num_outputs
            out = torch.empty(x.shape[0], columns)
        if self.team is None:
            result = self.twin(x)
            return out.add_(result) if epilogue == Epilogue.ADD else out.copy_(result)
        if x.stride(-1) != 1 or x.dtype != torch.float32:
            x = x.float().contiguous()
        self.team.product(self._weight, x, out, epilogue)
        return out

    def twin(self, x: torch.Tensor, blocks: slice = slice(None)) -> torch.Tensor:
        """The same in torch, without the sum of ADD. `blocks`: of the outputs of these blocks."""
        packed = self.packed[blocks]
        if self.scales is None:
            y = F.linear(x, unpack(self.kind, packed, self.num_inputs))
        else:
            y = multiply_integers(self.kind, x, packed, self.scales[blocks])
        if self.bias is not None:
            y = y + self.bias.view(-1, BLOCK)[blocks].flatten()
        if not self.gated:
            return y[:, : self.num_outputs]
        gate, up = y.view(x.shape[0], -1, 2, BLOCK).unbind(2)
        columns = self.num_outputs // 2
        return (F.silu(gate) * up).reshape(x.shape[0], -1)[:, :columns]


def pack_linear(
    kind: Kind,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    team: Team | None,
    variant: int = 0,
) -> PackedLinear:
    """A linear map of one weight [outputs, inputs]."""
    packed = PackedLinear(kind, weight.shape[0], weight.shape[1], team, variant=variant)
    packed.place(Part(weight, 0))
    if bias is not None:
        packed.place_bias(bias)
    return packed


def pack_gate_up(
    kind: Kind, gate: torch.Tensor, up: torch.Tensor, team: Team | None, variant: int = 0
) -> PackedLinear:
    """silu(gate x) * (up x), for SILU_MUL: gate and up [outputs, inputs] alternate by blocks."""
    outputs = 2 * gate.shape[0]
    packed = PackedLinear(kind, outputs, gate.shape[1], team, gated=True, variant=variant)
    packed.place(Part(gate, 0, 2))
    packed.place(Part(up, 1, 2))
    return packed
