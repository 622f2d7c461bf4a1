"""Decoder layers and the head by the compiled kernels: one call for all layers, or one each.

The hidden state is fp32 [rows, hidden] and changed in place.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from xllm.worker.kernels.attention import StepArrays
from xllm.worker.kernels.experts import NO_SUCH_SLOT, PackedExperts
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.kernels.structures import (
    ATTENTION_HALF,
    BOTH_HALVES,
    MLP_HALF,
    CAttentionShape,
    CHead,
    CHeadShape,
    CLayer,
)
from xllm.worker.kernels.team import Team


@dataclasses.dataclass(frozen=True, slots=True)
class LayerParts:
    """The weights of a decoder layer as the kernels take them: norms of any type, products
    packed. The half behind attention is `gate_up` and `down`, or `experts`."""

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear | None
    down: PackedLinear | None
    input_norm: torch.Tensor
    output_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    experts: PackedExperts | None = None


class FusedLayer:
    """Layer `index` of a model, prepared once. `window`: 0 for none."""

    def __init__(
        self,
        team: Team,
        parts: LayerParts,
        index: int,
        window: int,
        layer_bytes: int,
        variant: int = 0,
    ) -> None:
        self._team = team
        self._variant = variant
        self._parts = parts
        norms = (parts.input_norm, parts.output_norm, parts.q_norm, parts.k_norm)
        self._norms = [None if norm is None else norm.float().contiguous() for norm in norms]
        addresses = [None if norm is None else norm.data_ptr() for norm in self._norms]
        gate_up, down = parts.gate_up, parts.down
        self._layer = CLayer(
            qkv=parts.qkv.c_weight,
            out=parts.out.c_weight,
            input_norm=addresses[0],
            output_norm=addresses[1],
            heads=CHeadShape(
                parts.num_heads,
                parts.num_kv_heads,
                parts.head_dim,
                parts.head_dim,
                addresses[2],
                addresses[3],
                parts.eps,
            ),
            attention=CAttentionShape(parts.num_heads, window, parts.head_dim**-0.5, 0.0),
            hidden=parts.qkv.num_inputs,
            intermediate=0 if down is None else down.num_inputs,
            kv_offset=index * layer_bytes,
        )
        if parts.experts is not None:
            self._layer.experts = parts.experts.address
        else:
            assert gate_up is not None
            assert down is not None
            self._layer.gate_up, self._layer.down = gate_up.c_weight, down.c_weight

    def __call__(self, hidden: torch.Tensor, arrays: StepArrays) -> None:
        """One layer of all rows of a step."""
        self._run(hidden, arrays, BOTH_HALVES, None)

    @property
    def address(self) -> int:
        """Of what the kernels know of it; valid as long as it lives."""
        return ctypes.addressof(self._layer)

    def refuse(self, failed: int) -> None:
        """EngineError where what a kernel gave says that the layer's table of experts is wrong."""
        if self._parts.experts is not None:
            self._parts.experts.refuse(failed)
        assert not failed

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts, which count all rows."""
        return self._parts.experts is None

    def for_rows(self, hidden: torch.Tensor, arrays: StepArrays, rows: torch.Tensor) -> None:
        """One layer whose feed-forward half sees these `rows` (int64) alone; keys and values of
        all rows are written, and the other rows keep what attention gave them."""
        self._run(hidden, arrays, ATTENTION_HALF, None)
        part = hidden.index_select(0, rows)
        num_rows, arrays.step.num_rows = arrays.step.num_rows, len(part)
        self._run(part, arrays, MLP_HALF, None)
        arrays.step.num_rows = num_rows
        hidden.index_copy_(0, rows, part)

    def attention_half(self, hidden: torch.Tensor, arrays: StepArrays, out: torch.Tensor) -> None:
        """What attention would add to hidden, into `out` (fp32 [rows, hidden], contiguous): ranks
        that have a part of the heads sum theirs."""
        self._run(hidden, arrays, ATTENTION_HALF, out)

    def mlp_half(self, hidden: torch.Tensor, arrays: StepArrays, out: torch.Tensor) -> None:
        """What the feed-forward half would add to hidden, into `out` as above."""
        self._run(hidden, arrays, MLP_HALF, out)

    def _run(
        self, hidden: torch.Tensor, arrays: StepArrays, halves: int, out: torch.Tensor | None
    ) -> None:
        c, team, step = self._team.compiled.c, self._team, ctypes.byref(arrays.step)
        layer = ctypes.byref(self._layer)
        wanted = c.xk_layer_scratch(team.handle, layer, step)
        arrays.set_scratch(team.scratch(wanted), wanted)
        assert out is None or (out.is_contiguous() and out.shape == hidden.shape)
        to = None if out is None else out.data_ptr()
        failed = c.xk_layer(team.handle, self._variant, layer, step, hidden.data_ptr(), halves, to)
        self.refuse(failed)


class FusedLayers:
    """Layers that follow each other, in one call: what lies between two calls of a layer is then a
    barrier of the team's threads, not Python."""

    def __init__(self, team: Team, layers: Sequence[FusedLayer], variant: int = 0) -> None:
        self._team = team
        self._variant = variant
        self._layers = layers
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))

    def __call__(self, hidden: torch.Tensor, arrays: StepArrays) -> None:
        """All of them, of all rows of a step."""
        if not self._layers:
            return
        c, team, step = self._team.compiled.c, self._team, ctypes.byref(arrays.step)
        layers, count = self._addresses, len(self._layers)
        wanted = c.xk_layers_scratch(team.handle, layers, count, step)
        arrays.set_scratch(team.scratch(wanted), wanted)
        failed = c.xk_layers(team.handle, self._variant, layers, count, step, hidden.data_ptr())
        if failed <= NO_SUCH_SLOT:
            self._layers[NO_SUCH_SLOT - failed].refuse(NO_SUCH_SLOT)
        assert not failed


class FusedHead:
    """Norm and head: hidden [rows, hidden] fp32 to logits [rows, vocab]."""

    def __init__(
        self, team: Team, norm: torch.Tensor, eps: float, weight: PackedLinear, variant: int = 0
    ) -> None:
        self._team = team
        self._variant = variant
        self._norm = norm.float().contiguous()
        self._weight = weight
        self._head = CHead(weight.c_weight, self._norm.data_ptr(), eps, weight.num_inputs)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """A row's logits do not depend on the rows beside it."""
        hidden = hidden.contiguous()
        rows = torch.arange(hidden.shape[0], dtype=torch.int32)
        logits = torch.empty((hidden.shape[0], self._weight.num_outputs))
        c, team, head = self._team.compiled.c, self._team, ctypes.byref(self._head)
        scratch = team.scratch(c.xk_head_scratch(head, len(rows)))
        c.xk_head(
            team.handle,
            self._variant,
            head,
            hidden.data_ptr(),
            rows.data_ptr(),
            len(rows),
            logits.data_ptr(),
            scratch,
        )
        return logits


def arg_max(
    team: Team, logits: torch.Tensor, variant: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of each row [rows, n], fp32, and its place (int32), the first of equals;
    NaN for a row that holds one."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    places = torch.empty(logits.shape[0], dtype=torch.int32)
    tops = torch.empty(logits.shape[0])
    team.compiled.c.xk_arg_max(
        team.handle,
        variant,
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[0],
        logits.shape[1],
        places.data_ptr(),
        tops.data_ptr(),
    )
    return tops, places
