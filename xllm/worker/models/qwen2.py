"""Qwen2 and Qwen2.5: biases on q, k and v."""

from __future__ import annotations

from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable
from xllm.worker.models.dense import DenseDecoder, qwen_windows, read_dense
from xllm.worker.models.model import ModelFamily


class Qwen2Model(DenseDecoder):
    """Qwen2ForCausalLM."""


def qwen2_family() -> ModelFamily:
    """Qwen2ForCausalLM."""
    return ModelFamily(_read, _build)


def _read(raw: RawConfig) -> ModelConfig:
    return read_dense(
        raw,
        layer_windows=qwen_windows(raw),
        num_kv_heads=32,
        qkv_bias=True,
        max_positions=32768,
    )


def _build(config: ModelConfig, table: WeightTable) -> Qwen2Model:
    return Qwen2Model(config, table)
