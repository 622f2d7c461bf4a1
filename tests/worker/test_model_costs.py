"""Least bytes and operations of a step, counted from checkpoints of known shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import make_model
from xllm.worker.loader.checkpoint import TensorEntry
from xllm.worker.loader.config import RawConfig
from xllm.worker.model_costs import count_costs, read_costs


def entry(name, *shape):
    return TensorEntry(name, Path("f"), "BF16", shape, 0, 0)


def test_a_dense_model_from_its_files(tmp_path):
    path = make_model("qwen3", tmp_path / "m", tokenizer="none", vocab_size=512)
    costs = read_costs(path)
    hidden, inner, heads, kv_heads, dim, layers = 64, 192, 4, 2, 32, 3
    products = hidden * heads * dim * 2 + 2 * hidden * kv_heads * dim + 3 * hidden * inner
    assert costs.layer_weights == layers * products
    assert costs.head_weights == 512 * hidden
    assert costs.score_flops == 4 * heads * dim * layers
    assert costs.layer_flops(5) == 2 * 5 * layers * products
    assert costs.layer_reads(1) == costs.layer_reads(32) == layers * products


def test_experts_count_as_far_as_rows_reach_them():
    raw = RawConfig({"vocab_size": 1000, "num_experts": 8, "num_experts_per_tok": 2})
    entries = [entry("model.embed_tokens.weight", 1000, 16), entry("lm_head.weight", 1000, 16)]
    entries += [entry(f"model.layers.0.mlp.experts.{k}.up_proj.weight", 4, 16) for k in range(8)]
    entries += [entry("model.layers.0.mlp.gate.weight", 8, 16), entry("model.norm.weight", 16)]
    costs = count_costs(entries, raw)
    assert (costs.layer_weights, costs.expert_weights, costs.head_weights) == (128, 512, 16_000)
    assert costs.layer_flops(3) == 2 * 3 * (128 + 512 / 4)
    assert costs.layer_reads(1) == pytest.approx(128 + 128)
    assert costs.layer_reads(2) == pytest.approx(128 + 512 * (1 - 0.75**2))
    assert costs.layer_reads(500) == pytest.approx(640)
    assert costs.head_flops(2) == 64_000


def test_positions_and_other_names_of_heads():
    raw = RawConfig({"vocab_size": 50, "n_head": 2})
    entries = [entry("transformer.wte.weight", 50, 8), entry("transformer.wpe.weight", 32, 8)]
    costs = count_costs([*entries, entry("transformer.h.0.c.weight", 8, 24)], raw)
    assert (costs.layer_weights, costs.head_weights, costs.score_flops) == (192, 400, 0)
