"""Llama (2, 3, 3.1, 3.2 and models of their form): optional biases, llama3 rope scaling."""

from __future__ import annotations

from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable
from xllm.worker.models.dense import DenseDecoder, read_dense
from xllm.worker.models.model import ModelFamily


class LlamaModel(DenseDecoder):
    """LlamaForCausalLM."""


def llama_family() -> ModelFamily:
    """LlamaForCausalLM."""
    return ModelFamily(_read, _build)


def _read(raw: RawConfig) -> ModelConfig:
    """`attention_bias` is of all four projections."""
    bias = raw.flag("attention_bias", False)
    return read_dense(
        raw,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=raw.flag("mlp_bias", False),
        max_positions=2048,
    )


def _build(config: ModelConfig, table: WeightTable) -> LlamaModel:
    return LlamaModel(config, table)
