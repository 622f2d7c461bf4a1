"""What a model is: embed, layers, head, and the kinds of KV it keeps.

The executor owns the loop over the layers; a native model computes one layer at a time. No model
knows of sequences, plans or memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from xllm.worker.kernels.fused import LayerParts
from xllm.worker.layers.decoder import Attention, LayerWeights
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.layers.rotary import RotaryTables
from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.kv_groups import KvGroupSpec
from xllm.worker.loader.weights import WeightTable
from xllm.worker.platform.back_end_ops import BackEndOps


class DecoderModel(Protocol):
    """A decoder with loaded weights; NativeModel and WholeModel are the two kinds."""

    @property
    def config(self) -> ModelConfig:
        """What it was built from."""

    @property
    def kv_groups(self) -> tuple[KvGroupSpec, ...]:
        """Its kinds of KV; every layer is in exactly one."""

    @property
    def experts(self) -> ExpertTables | None:
        """Where its experts are and what they had to do; None: it has none."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [rows, hidden] to fp32 logits [rows, vocab]."""

    def normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [rows, hidden] behind the model's last norm."""


class NativeModel(DecoderModel, Protocol):
    """A decoder that computes one layer at a time."""

    @property
    def ops(self) -> BackEndOps | None:
        """What its layers compute with beside torch; attention may, too."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows] int64 to hidden [rows, hidden]."""

    def tables(self, positions: torch.Tensor) -> RotaryTables:
        """What the layers need of the rows' positions [rows] int64; once a step."""

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the kernels: cosines and sines, fp32 [rows, head_dim / 2]."""

    def weights(self) -> list[LayerWeights] | None:
        """Each layer's weights in torch; None: they are packed."""

    def parts(self) -> list[LayerParts] | None:
        """Each layer's weights as the kernels take them; None: they are not packed, or not all of
        a kind that the kernels know."""

    def layer(
        self, index: int, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """Layer `index` of all rows."""

    def attention_half(
        self, index: int, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """What the attention of layer `index` adds to hidden: of a rank, its part of that."""

    def mlp_half(self, index: int, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        """The same of its feed-forward half."""

    def finish(self) -> None:
        """Called once, after the weights are filled."""


@runtime_checkable
class WholeModel(DecoderModel, Protocol):
    """A decoder that computes all its layers in one call."""

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        before_layer: Callable[[int], None],
        after_layer: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """Rows [rows] int64 at `positions` [rows] int64 through all layers: [rows, hidden].
        Each layer is told of before and after, the latter with its output."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFamily:
    """How to make the models of an architecture: read its configuration, build it with weights
    still to be filled."""

    read: Callable[[RawConfig], ModelConfig]
    build: Callable[[ModelConfig, WeightTable], NativeModel]
