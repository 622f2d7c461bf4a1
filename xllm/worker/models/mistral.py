"""Mistral (7B, Nemo and models of their form): no biases, a window on every layer or none."""

from __future__ import annotations

from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable
from xllm.worker.models.dense import DenseDecoder, read_dense
from xllm.worker.models.model import ModelFamily


class MistralModel(DenseDecoder):
    """MistralForCausalLM."""


def mistral_family() -> ModelFamily:
    """MistralForCausalLM."""
    return ModelFamily(_read, _build)


def _read(raw: RawConfig) -> ModelConfig:
    """`sliding_window`: null means none; a file without the key means the library's 4096."""
    window = 4096
    if "sliding_window" in raw.values:
        window = raw.integer("sliding_window", 0)
    return read_dense(
        raw,
        layer_windows=(window,) * raw.integer("num_hidden_layers"),
        num_kv_heads=8,
        max_positions=131072,
    )


def _build(config: ModelConfig, table: WeightTable) -> MistralModel:
    return MistralModel(config, table)
