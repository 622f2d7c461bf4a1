"""One layer of a decoder: attention and gated MLP, each behind a norm and beside a residual.

It computes; where keys and values are kept, and which of them a row sees, is the attention's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from xllm.worker.kernels.experts import PackedExperts
from xllm.worker.kernels.fused import LayerParts
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.layers.linear import Linear
from xllm.worker.layers.mlp import GatedMlp
from xllm.worker.layers.norm import RmsNorm
from xllm.worker.layers.rotary import RotaryTables
from xllm.worker.loader.config import ModelConfig
from xllm.worker.loader.weights import WeightTable

_SLICE_ROWS = 256
"""Rows that a CPU projects at a time: enough for its products, and seconds less without a word."""


class Attention(Protocol):
    """Attention over all that a step's rows may see, and how a layer says that it moves on."""

    def tick(self) -> None:
        """A bounded piece of the layer is done."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Keep k and v [rows, kv_heads, head_dim] of this layer, then give the attention of
        q [rows, heads, head_dim] as [rows, heads * head_dim]. Scores are multiplied by `scale`
        (None: 1 / sqrt(head_dim)), then bent to softcap * tanh(score / softcap) where it is
        not 0."""


class FeedForward(Protocol):
    """The half of a layer that treats each row alone."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, hidden]."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights as torch has them. `head_norms`: of queries and keys [head_dim], where the
    family has them; `mlp`: its feed-forward half, which treats each row alone."""

    qkv: Linear
    out: Linear
    mlp: FeedForward
    input_norm: RmsNorm
    output_norm: RmsNorm
    head_norms: tuple[torch.Tensor, torch.Tensor] | None


class DecoderLayer:
    """Layer `index` of a model; its weights are named by `prefix`, as the checkpoint has them.
    `mlp` is its feed-forward half; None: the gated MLP of the configuration."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        prefix: str,
        table: WeightTable,
        mlp: FeedForward | None = None,
    ) -> None:
        self.index = index
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._input_norm = RmsNorm(
            table.one(f"{prefix}.input_layernorm.weight", hidden), eps, table.ops
        )
        self._output_norm = RmsNorm(
            table.one(f"{prefix}.post_attention_layernorm.weight", hidden), eps, table.ops
        )
        heads, kv_heads = config.num_heads, config.num_kv_heads
        rows = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
        attention = f"{prefix}.self_attn"
        self._qkv = table.linear(
            [f"{attention}.{x}_proj" for x in "qkv"], rows, hidden, bias=config.qkv_bias
        )
        self._out = table.linear([f"{attention}.o_proj"], [hidden], rows[0], bias=config.out_bias)
        self._qk_norm: RmsNorm | None = None
        self._qk_norm_parts: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.qk_norm:
            self._qk_norm_parts = (
                table.one(f"{attention}.q_norm.weight", config.head_dim),
                table.one(f"{attention}.k_norm.weight", config.head_dim),
            )
            self._qk_norm = RmsNorm(torch.empty(0), eps, table.ops)
        self._mlp = mlp or gated_mlp(config, f"{prefix}.mlp", table)

    def finish(self) -> None:
        """Called once the weights are loaded: the norms of q and k become one weight a head,
        for both are normalised in one go."""
        if self._qk_norm is not None and self._qk_norm_parts is not None:
            q, k = self._qk_norm_parts
            self._qk_norm.weight = torch.cat(
                (q.expand(self._num_heads, -1), k.expand(self._num_kv_heads, -1))
            )

    def weights(self) -> LayerWeights | None:
        """The weights as they are; None: they are packed."""
        qkv, out = self._qkv, self._out
        if not isinstance(qkv, Linear) or not isinstance(out, Linear):
            return None
        norms = self._input_norm, self._output_norm
        return LayerWeights(qkv, out, self._mlp, *norms, self._qk_norm_parts)

    def parts(self) -> LayerParts | None:
        """The weights as the kernels take them; None: they are not packed, or the feed-forward half
        is of a kind that the kernels do not know."""
        qkv, out, mlp = self._qkv, self._out, self._mlp
        if not isinstance(qkv, PackedLinear) or not isinstance(out, PackedLinear):
            return None
        q_norm, k_norm = self._qk_norm_parts or (None, None)
        gate_up: PackedLinear | None = None
        down: PackedLinear | None = None
        experts: PackedExperts | None = None
        if isinstance(mlp, GatedMlp):
            assert isinstance(mlp.gate_up, PackedLinear)
            assert isinstance(mlp.down, PackedLinear)
            gate_up, down = mlp.gate_up, mlp.down
        elif isinstance(mlp, PackedExperts):
            experts = mlp
        else:
            return None
        return LayerParts(
            qkv,
            out,
            gate_up,
            down,
            self._input_norm.weight,
            self._output_norm.weight,
            q_norm,
            k_norm,
            self._input_norm.eps,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            experts,
        )

    def __call__(
        self, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """[rows, hidden] to [rows, hidden]."""
        hidden = hidden + self.attention_half(hidden, tables, attention)
        return hidden + self.mlp_half(hidden, attention)

    def attention_half(
        self, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """What attention adds to hidden [rows, hidden]."""
        rows = hidden.shape[0]
        count = _num_slices(hidden)
        qkv = _in_slices(self._before, count, attention.tick, hidden)
        qkv = qkv.view(rows, -1, self._head_dim)
        heads, kv_heads = self._num_heads, self._num_kv_heads
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        qk = tables.rotate(qk)
        attended = attention.attend(self.index, qk[:, :heads], qk[:, heads:], v)
        return _in_slices(self._out, count, attention.tick, attended)

    def mlp_half(self, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        """What the feed-forward half adds to hidden [rows, hidden]."""
        return _in_slices(self._behind, _num_slices(hidden), attention.tick, hidden)

    def _before(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._qkv(self._input_norm(hidden))

    def _behind(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._mlp(self._output_norm(hidden))


def gated_mlp(config: ModelConfig, prefix: str, table: WeightTable) -> GatedMlp:
    """The MLP of a configuration, its weights named as the checkpoint has them."""
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate_up = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
    return GatedMlp(
        table.linear(gate_up, [inner, inner], hidden, bias=bias, gated=True),
        table.linear([f"{prefix}.down_proj"], [hidden], inner, bias=bias),
        table.ops,
    )


def _num_slices(hidden: torch.Tensor) -> int:
    return -(-hidden.shape[0] // _SLICE_ROWS) if hidden.device.type == "cpu" else 1


def _in_slices(
    work: Callable[..., torch.Tensor],
    count: int,
    tick: Callable[[], None],
    *inputs: torch.Tensor,
) -> torch.Tensor:
    """`work`, which treats each row of its inputs alone, over `count` slices of like size."""
    if count == 1:
        return work(*inputs)
    parts = []
    for rows in zip(*(x.chunk(count) for x in inputs), strict=True):
        parts.append(work(*rows))
        tick()
    return torch.cat(parts)
