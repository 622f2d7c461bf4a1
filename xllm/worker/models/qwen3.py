"""Qwen3 (dense): norms on every head of q and k, head_dim of its own."""

from __future__ import annotations

from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable
from xllm.worker.models.dense import DenseDecoder, qwen_windows, read_dense
from xllm.worker.models.model import ModelFamily


class Qwen3Model(DenseDecoder):
    """Qwen3ForCausalLM."""


def qwen3_family() -> ModelFamily:
    """Qwen3ForCausalLM."""
    return ModelFamily(_read, _build)


def _read(raw: RawConfig) -> ModelConfig:
    """A file without head_dim means the library's 128, not hidden / heads."""
    bias = raw.flag("attention_bias", False)
    return read_dense(
        raw,
        layer_windows=qwen_windows(raw),
        head_dim=128,
        num_kv_heads=32,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        max_positions=32768,
    )


def _build(config: ModelConfig, table: WeightTable) -> Qwen3Model:
    return Qwen3Model(config, table)
