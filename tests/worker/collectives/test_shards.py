"""Which part of a model a rank has: every number once, and parts that sum up to the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import ConfigError
from xllm.worker.loader.config import ExpertConfig, ModelConfig, RopeConfig
from xllm.worker.loader.shards import ShardPlan

LAYER = "model.layers.0"


def config_of(heads: int, kv_heads: int, inner: int, vocab: int = 100, **more) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=inner,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=6,
        rms_norm_eps=1e-6,
        max_positions=64,
        tie_word_embeddings=False,
        rope=RopeConfig(),
        layer_windows=(0, 0),
        **more,
    )


@st.composite
def plans(draw) -> list[ShardPlan]:
    """All ranks of a model that can be cut: KV heads as many as ranks, more, or fewer."""
    size = draw(st.integers(1, 6))
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    kv_heads = draw(st.sampled_from([*divisors, *(size * n for n in (1, 2, 3))]))
    least = max(kv_heads, size)
    heads = least * draw(st.integers(1, 3))
    vocab = draw(st.integers(size * size, 200))
    config = config_of(heads, kv_heads, size * draw(st.integers(1, 9)), vocab)
    return [ShardPlan(config, rank, size) for rank in range(size)]


def indices(plan: ShardPlan, name: str, whole: int) -> list[int]:
    cut = plan.cut(name)
    return list(range(whole)) if cut is None else list(range(whole))[cut.slices[cut.axis]]


@given(plans())
def test_every_number_belongs_to_one_rank(ranks):
    config = ranks[0].config
    wholes = {
        f"{LAYER}.self_attn.q_proj.weight": config.num_heads * config.head_dim,
        f"{LAYER}.self_attn.q_proj.bias": config.num_heads * config.head_dim,
        f"{LAYER}.self_attn.o_proj.weight": config.num_heads * config.head_dim,
        f"{LAYER}.mlp.gate_proj.weight": config.intermediate_size,
        f"{LAYER}.mlp.up_proj.bias": config.intermediate_size,
        f"{LAYER}.mlp.down_proj.weight": config.intermediate_size,
    }
    for name, whole in wholes.items():
        parts = [index for plan in ranks for index in indices(plan, name, whole)]
        assert parts == list(range(whole)), name
    heads = [plan.head() for plan in ranks]
    assert heads == [plan.cut("lm_head.weight") or plan.head() for plan in ranks]
    rows = [row for cut in heads for row in range(cut.first, cut.first + cut.count)]
    assert rows == list(range(config.vocab_size))
    assert all(1 <= cut.count <= ranks[0].head_rows for cut in heads)
    assert [cut.count for cut in heads[:-1]] == [ranks[0].head_rows] * (len(ranks) - 1)


@given(plans())
def test_query_heads_are_with_their_kv_head(ranks):
    config, dim = ranks[0].config, ranks[0].config.head_dim
    group = config.num_heads // config.num_kv_heads
    for plan in ranks:
        q = plan.cut(f"{LAYER}.self_attn.q_proj.weight")
        first, count = (0, config.num_heads) if q is None else (q.first // dim, q.count // dim)
        kv = indices(plan, f"{LAYER}.self_attn.k_proj.bias", config.num_kv_heads * dim)
        assert kv == indices(plan, f"{LAYER}.self_attn.v_proj.weight", config.num_kv_heads * dim)
        local = plan.local
        assert (local.num_heads, local.num_kv_heads * dim) == (count, len(kv))
        local_group = local.num_heads // local.num_kv_heads
        for head in range(count):
            assert kv[head // local_group * dim] // dim == (first + head) // group


@given(plans(), st.integers(0, 5))
def test_parts_sum_up_to_the_whole(ranks, seed):
    """A gated MLP and the head by parts."""
    config = ranks[0].config
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = config.intermediate_size, config.hidden_size
    shapes = {
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
        "down_proj.bias": (hidden,),
    }
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    x = torch.randn((3, hidden), generator=generator, dtype=torch.float64)

    def mlp(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        between = F.silu(x @ weights["gate_proj.weight"].T) * (x @ weights["up_proj.weight"].T)
        return between @ weights["down_proj.weight"].T + weights["down_proj.bias"]

    def part(plan: ShardPlan, name: str) -> torch.Tensor:
        full = f"{LAYER}.mlp.{name}"
        if plan.is_left_out(full):
            return torch.zeros_like(made[name])
        cut = plan.cut(full)
        return made[name] if cut is None else made[name][cut.slices]

    parts = [mlp({name: part(plan, name) for name in made}) for plan in ranks]
    torch.testing.assert_close(sum(parts), mlp(made))


def test_the_rest_is_whole_and_one_rank_has_all():
    config = config_of(4, 2, 8)
    plan = ShardPlan(config, 1, 2)
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{LAYER}.input_layernorm.weight",
        f"{LAYER}.self_attn.q_norm.weight",
        f"{LAYER}.mlp.gate.weight",
    ):
        assert plan.cut(name) is None
        assert not plan.is_left_out(name)
    assert plan.cut(f"{LAYER}.self_attn.o_proj.bias") is None
    assert plan.is_left_out(f"{LAYER}.self_attn.o_proj.bias")
    alone = ShardPlan(config)
    assert alone.local == config
    assert alone.cut(f"{LAYER}.self_attn.q_proj.weight") is None
    assert not alone.is_left_out(f"{LAYER}.self_attn.o_proj.bias")


def test_experts_are_cut_by_their_own_size():
    experts = ExpertConfig(4, 2, 6, False, (1,))
    plan = ShardPlan(config_of(4, 2, 8, experts=experts), 1, 2)
    assert plan.local.experts == dataclasses.replace(experts, intermediate_size=3)
    cut = plan.cut("model.layers.1.mlp.experts.3.down_proj.weight")
    assert (cut.axis, cut.first, cut.count, cut.whole) == (1, 3, 3, 6)
    assert cut.whole_shape((24, 3)) == (24, 6)
    assert plan.cut("model.layers.0.mlp.down_proj.weight").whole == 8


@pytest.mark.parametrize(
    ("config", "size", "word"),
    [
        (config_of(4, 4, 8), 3, "num_attention_heads 4"),
        (config_of(6, 3, 8), 2, "num_key_value_heads 3"),
        (config_of(4, 2, 9), 2, "intermediate_size 9"),
        (config_of(4, 2, 8, vocab=5), 4, "vocab_size 5"),
        (config_of(4, 2, 8, experts=ExpertConfig(4, 2, 5, False, (0, 1))), 2, "moe_intermediate"),
    ],
    ids=str,
)
def test_models_that_cannot_be_cut_are_refused(config, size, word):
    with pytest.raises(ConfigError, match=word):
        ShardPlan(config, 0, size)


def test_the_mlp_size_does_not_matter_where_all_layers_have_experts():
    ShardPlan(config_of(4, 2, 9, experts=ExpertConfig(4, 2, 6, False, (0, 1))), 0, 2)
