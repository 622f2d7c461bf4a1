"""Qwen3-MoE: Qwen3 whose layers (all, or some) have experts in place of the one MLP."""

from __future__ import annotations

import dataclasses

from xllm.errors import ConfigError
from xllm.worker.kernels.experts import ExpertSizes
from xllm.worker.layers.decoder import FeedForward
from xllm.worker.layers.experts import ExpertTables, SparseMlp
from xllm.worker.loader.config import ExpertConfig, ModelConfig, RawConfig
from xllm.worker.loader.weights import WeightTable
from xllm.worker.models.dense import DenseDecoder, read_dense
from xllm.worker.models.model import ModelFamily


class Qwen3MoeModel(DenseDecoder):
    """Qwen3MoeForCausalLM. `num_spare`: slots of each layer that hold no expert at first."""

    def __init__(self, config: ModelConfig, table: WeightTable, num_spare: int = 0) -> None:
        assert config.experts is not None
        self.experts: ExpertTables = ExpertTables(
            config.num_layers, config.experts.num_experts, table.device
        )
        self._num_spare = num_spare
        super().__init__(config, table)

    def feed_forward(self, index: int, prefix: str, table: WeightTable) -> FeedForward | None:
        """Experts on the sparse layers."""
        experts, hidden = self.config.experts, self.config.hidden_size
        assert experts is not None
        if index not in experts.layers:
            return None
        inner, spare = experts.intermediate_size, self._num_spare
        names = [f"{prefix}.experts.{number}" for number in range(experts.num_experts)]
        if table.team is not None:
            sizes = ExpertSizes(
                experts.num_experts,
                experts.num_experts + spare,
                experts.top_k,
                experts.normalise,
                hidden,
                inner,
            )
            slots, counts = self.experts.slots[index], self.experts.counts[index]
            return table.experts(f"{prefix}.gate.weight", names, sizes, slots, counts)
        return SparseMlp(
            index,
            table.one(f"{prefix}.gate.weight", experts.num_experts, hidden),
            table.grouped(names, ("gate_proj.weight", "up_proj.weight"), inner, hidden, spare),
            table.grouped(names, ("down_proj.weight",), hidden, inner, spare),
            self.experts,
            experts.top_k,
            experts.normalise,
        )


def qwen3_moe_family() -> ModelFamily:
    """Qwen3MoeForCausalLM."""
    return ModelFamily(_read, _build)


def _read(raw: RawConfig) -> ModelConfig:
    """Files name the number of experts in either of two ways; one without head_dim means
    hidden / heads here, unlike the dense Qwen3's."""
    num_layers = raw.integer("num_hidden_layers")
    key = "num_experts" if raw.has("num_experts") else "num_local_experts"
    num_experts = raw.integer(key, 128)
    top_k = raw.integer("num_experts_per_tok", 8)
    if top_k > num_experts:
        raise ConfigError(f"config.json: num_experts_per_tok {top_k} of {key} {num_experts}")
    dense = raw.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise ConfigError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    step = raw.integer("decoder_sparse_step", 1)
    bias = raw.flag("attention_bias", False)
    window = raw.integer("sliding_window", 0 if "sliding_window" in raw.values else 4096)
    used = raw.flag("use_sliding_window", False)  # then on every layer
    config = read_dense(
        raw,
        layer_windows=(window if used else 0,) * num_layers,
        num_kv_heads=4,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        max_positions=32768,
    )
    sparse = (i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return dataclasses.replace(
        config,
        experts=ExpertConfig(
            num_experts=num_experts,
            top_k=top_k,
            intermediate_size=raw.integer("moe_intermediate_size", 768),
            normalise=raw.flag("norm_topk_prob", False),
            layers=tuple(sparse),
        ),
    )


def _build(config: ModelConfig, table: WeightTable) -> Qwen3MoeModel:
    return Qwen3MoeModel(config, table)
