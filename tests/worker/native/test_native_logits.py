"""Logits of every family against transformers, whole and in chunks, alone and mixed."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import ABSENT, FAMILIES, make_model
from tests.worker.native.model_runner import Runner
from tests.worker.native.plan_driver import KERNELS, random_prompts
from tests.worker.native.reference import LOGIT_BOUND, load_reference, reference_logits
from xllm.worker.attention.plan import Span

LENGTH = 90

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "sharded": ("qwen3", {"shards": 3}),
    "tie flag missing": ("qwen3", {"tie_word_embeddings": ABSENT}),
    "tied qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "head_dim missing (qwen3: 128)": ("qwen3", {"head_dim": ABSENT}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2 window used": ("qwen2", {"use_sliding_window": True}),
    "qwen2 layer types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "window smaller than a block": ("mistral", {"sliding_window": 5}),
    "mistral window missing": ("mistral", {"sliding_window": ABSENT}),
    "linear rope": ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "yarn": ("qwen2", {"rope_scaling": {**YARN}}),
    "yarn, own scale": ("qwen2", {"rope_scaling": {**YARN, "attention_factor": 0.9}}),
    "yarn, mscales": ("qwen2", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "new spelling": (
        "qwen3",
        {
            "rope_scaling": ABSENT,
            "rope_theta": ABSENT,
            "torch_dtype": ABSENT,
            "dtype": "float32",
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
    ),
    "experts by their other name": (
        "qwen3-moe",
        {"num_experts": ABSENT, "num_local_experts": 6, "num_experts_per_tok": 3},
    ),
    "experts, not normalised": ("qwen3-moe", {"norm_topk_prob": False}),
    "experts on every other layer": ("qwen3-moe", {"decoder_sparse_step": 2}),
    "experts but on one layer": (
        "qwen3-moe",
        {"mlp_only_layers": [1], "moe_intermediate_size": 50},
    ),
    "experts behind a window": (
        "qwen3-moe",
        {"use_sliding_window": True, "sliding_window": 20, "attention_bias": True},
    ),
    "new spelling of llama3": (
        "llama",
        {
            "rope_scaling": ABSENT,
            "rope_theta": ABSENT,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


def blocks(first: int) -> array[int]:
    """A block table that runs backwards through the pool."""
    return array("q", range(first + 15, first - 1, -1))


def check_all_ways(
    runner: Runner, want: torch.Tensor, ids: list[int], bound: float, single: bool = True
) -> None:
    """The text whole, in chunks, row by row (if `single`), and in chunks beside other
    sequences."""

    def close(got: torch.Tensor, start: int, end: int) -> None:
        assert (got - want[start:end]).abs().max() < bound

    close(runner.logits([Span(0, LENGTH, blocks(0))], ids), 0, LENGTH)
    for start, end in ((0, 37), (37, 38), (38, 77), (77, LENGTH)):
        got = runner.logits([Span(start, end - start, blocks(16))], ids[start:end])
        close(got, start, end)
    if single:
        rows = [Span(at, 1, blocks(32)) for at in range(LENGTH)]
        close(runner.logits(rows, ids, single=True), 0, LENGTH)
    # Beside a whole other text, a later chunk of the first, and two decodes of unlike length.
    other = ids[::-1]
    runner.logits([Span(0, 30, blocks(48))], ids[:30])
    runner.logits([Span(0, 5, blocks(64))], ids[:5])
    spans = [
        Span(30, 1, blocks(48)),
        Span(0, 20, blocks(80)),
        Span(5, 1, blocks(64)),
        Span(60, 25, blocks(16)),
        Span(LENGTH - 1, 1, blocks(0)),
    ]
    got = runner.logits(spans, [ids[30], *other[:20], ids[5], *ids[60:85], ids[LENGTH - 1]])
    close(got[:1], 30, 31)
    close(got[21:22], 5, 6)
    close(got[22:47], 60, 85)
    close(got[47:], LENGTH - 1, LENGTH)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_reference(family: str, kernels: str, tmp_path: Path) -> None:
    directory = make_model(family, tmp_path)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    want = reference_logits(load_reference(directory), ids)
    assert want.std() > 1  # else equal logits would prove little
    check_all_ways(Runner(directory, kernels=kernels), want, ids, LOGIT_BOUND)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_configuration_variants(name: str, kernels: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    directory = make_model(family, tmp_path, **overrides)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    want = reference_logits(load_reference(directory), ids)
    check_all_ways(Runner(directory, kernels=kernels), want, ids, LOGIT_BOUND)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen2", {"use_sliding_window": True}),
        ("mistral-window", {"sliding_window": None}),
        ("llama", {"rope_scaling": None}),
        ("llama", {"rope_theta": 10000.0}),
    ],
)
def test_settings_change_logits(family: str, changed: dict, tmp_path: Path) -> None:
    """The settings that the tests above rely on are felt at their lengths."""
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    one = Runner(make_model(family, tmp_path / "one"))
    two = Runner(make_model(family, tmp_path / "two", **changed))
    spans = [Span(0, LENGTH, blocks(0))]
    assert (one.logits(spans, ids) - two.logits(spans, ids)).abs().max() > 100 * LOGIT_BOUND


@pytest.mark.parametrize(
    ("family", "name", "kernels"),
    [
        *itertools.product(("qwen2", "qwen3", "llama", "mistral-window"), ("bfloat16",), KERNELS),
        ("llama2", "float16", "torch"),
    ],
)
def test_16_bit_is_as_near_to_fp32_as_the_reference(
    family: str, name: str, kernels: str, tmp_path: Path
) -> None:
    """In 16 bits both round; ours may stray from fp32 (of the same rounded weights) at most 1.5
    times as far as the reference's does at its worst, and 1.25 times on the average."""
    dtype: torch.dtype = getattr(torch, name)
    directory = make_model(family, tmp_path, dtype=name)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    exact = reference_logits(load_reference(directory), ids)
    theirs = reference_logits(load_reference(directory, dtype), ids) - exact
    runner = Runner(directory, dtype=name, kernels=kernels)
    assert runner.loaded.dtype == dtype
    ours = runner.logits([Span(0, LENGTH, blocks(0))], ids) - exact
    assert ours.abs().max() < 1.5 * theirs.abs().max()
    assert ours.abs().mean() < 1.25 * theirs.abs().mean()


def test_float16_files_are_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    directory = make_model("llama2", tmp_path, dtype="float16")
    assert Runner(directory).loaded.dtype == torch.float32
