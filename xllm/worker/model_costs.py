"""What a step of a model must read and compute at least, from its checkpoint's headers.

Matrices are known by their names and shapes, so that every family counts, native or not: those
with a number in their name belong to layers, those of the vocabulary's size are embedding and
head. Biases, norms and positions are left out: they weigh nothing beside them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path

from xllm.worker.loader.checkpoint import TensorEntry, open_checkpoint
from xllm.worker.loader.config import RawConfig, read_config

_IN_LAYER = re.compile(r"\.\d+\.")
_EXPERTS = ".experts."


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCosts:
    """Numbers of weights, and what a row does with them. `expert_share`: of the experts' weights
    that one row uses. `score_flops`: operations of attention for each row and position that it
    sees."""

    layer_weights: int
    expert_weights: int
    expert_share: float
    head_weights: int
    score_flops: int

    def layer_reads(self, num_rows: int) -> float:
        """Weights that a pass of so many rows reads in the layers: experts as far as rows that
        choose evenly reach them."""
        reached = 1 - (1 - self.expert_share) ** num_rows
        return self.layer_weights + reached * self.expert_weights

    def layer_flops(self, num_rows: int) -> float:
        """Operations of the layers' products for so many rows."""
        return 2 * num_rows * (self.layer_weights + self.expert_share * self.expert_weights)

    def head_flops(self, num_rows: int) -> float:
        """Operations of the head for so many rows."""
        return 2 * num_rows * self.head_weights


def read_costs(directory: Path) -> ModelCosts:
    """Of the model in a directory. ConfigError or DependencyError as a load would raise."""
    return count_costs(open_checkpoint(directory).entries.values(), read_config(directory))


def count_costs(entries: Iterable[TensorEntry], raw: RawConfig) -> ModelCosts:
    """Of these tensors under this configuration."""
    vocab = raw.integer("vocab_size")
    layers = experts = head = 0
    for entry in entries:
        if len(entry.shape) < 2:
            continue
        size = math.prod(entry.shape)
        if vocab in entry.shape and not _IN_LAYER.search(entry.name):
            head = size  # embedding and head are one shape, tied or not
        elif _EXPERTS in entry.name:
            experts += size
        elif _IN_LAYER.search(entry.name):
            layers += size
    return ModelCosts(layers, experts, _expert_share(raw), head, _score_flops(raw))


def _expert_share(raw: RawConfig) -> float:
    num_experts = raw.integer("num_experts", raw.integer("num_local_experts", 0, low=0), low=0)
    if not num_experts:
        return 1.0
    return raw.integer("num_experts_per_tok", num_experts) / num_experts


def _score_flops(raw: RawConfig) -> int:
    """Scores and weighted values: two products of head_dim a head and layer; 0 for families that
    name their heads otherwise."""
    heads = raw.integer("num_attention_heads", 0, low=0)
    if not heads:
        return 0
    head_dim = raw.integer("head_dim", raw.integer("hidden_size") // heads)
    return 4 * heads * head_dim * raw.integer("num_hidden_layers")
