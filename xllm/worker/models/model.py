"""What a native model is: embed, layers, head, and the kinds of KV it keeps.

The executor owns the loop over the layers; a model computes one layer at a time and knows nothing
of sequences, plans or memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from xllm.worker.layers.decoder import Attention
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.layers.rotary import RotaryTables
from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable


@dataclasses.dataclass(frozen=True, slots=True)
class KvGroupSpec:
    """Layers whose KV has one form: per token num_kv_heads x head_dim keys and values, of which
    a token sees the last `window` (0: all)."""

    name: str
    window: int
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


class NativeModel(Protocol):
    """A decoder with loaded weights."""

    @property
    def config(self) -> ModelConfig:
        """What it was built from."""

    @property
    def kv_groups(self) -> tuple[KvGroupSpec, ...]:
        """Its kinds of KV; every layer is in exactly one."""

    @property
    def experts(self) -> ExpertTables | None:
        """Where its experts are and what they had to do; None: it has none."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows] int64 to hidden [rows, hidden]."""

    def tables(self, positions: torch.Tensor) -> RotaryTables:
        """What the layers need of the rows' positions [rows] int64; once a step."""

    def layer(
        self, index: int, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """Layer `index` of all rows."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [rows, hidden] to fp32 logits [rows, vocab]."""

    def finish(self) -> None:
        """Called once, after the weights are filled."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFamily:
    """How to make the models of an architecture: read its configuration, build it with weights
    still to be filled."""

    read: Callable[[RawConfig], ModelConfig]
    build: Callable[[ModelConfig, WeightTable], NativeModel]
