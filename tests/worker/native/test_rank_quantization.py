"""Quantized ranks: each rounds its own part of the weights. How far their logits are from those of
one rank, and the same tokens however a prompt is computed."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.collectives.rank_threads import on_all
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.rank_executors import RankExecutors, rank_driver
from tests.worker.native.test_quantization import (
    DEMO,
    LENGTH,
    QUANTIZATIONS,
    check_tokens,
    logits_of,
    needs_library,
)
from xllm.worker.attention.plan import Span

pytestmark = needs_library

ALIGNED = {"num_attention_heads": 4, "head_dim": 64, "intermediate_size": 256}
"""Parts of two ranks that are whole groups of every kind."""
ODD = {"num_attention_heads": 4, "head_dim": 10, "intermediate_size": 94}


def rank_logits(driver: PlanDriver, ids: list[int]) -> torch.Tensor:
    """Of all positions of a text, which all ranks must have alike."""
    executors = driver.executor
    assert isinstance(executors, RankExecutors)
    span = Span(0, len(ids), array("q", range(-(-len(ids) // driver.ready.block_size))))

    def compute(rank: int) -> torch.Tensor:
        engine = executors.ranks[rank]._loaded()
        with torch.inference_mode():
            head = engine.drawer._head
            return head.whole(head.part(engine.loop.run([span], ids, ())))

    first, *others = on_all(executors.size, compute)
    assert all(torch.equal(first, other) for other in others)
    return first


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def logits_of_all(directory: Path, **asked: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one rank and of two."""
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    one, several = PlanDriver(directory, **asked), rank_driver(directory, **asked)
    found = logits_of(one, ids), rank_logits(several, ids)
    one.executor.close()
    several.executor.close()
    return found


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("shapes", [ALIGNED, ODD], ids=["whole groups", "cut groups"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_two_ranks_err_as_one_does(
    family: str, shapes: dict, quantization: str, tmp_path: Path
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    directory = make_model(family, tmp_path / "model", **shapes, **biases)
    plain, _ = logits_of_all(directory)
    one, two = logits_of_all(directory, quantization=quantization)
    error = distance(one, plain)
    assert 0.8 * error < distance(two, plain) < 1.2 * error
    # Weights that are rounded by groups of inputs are the same numbers, where no group is cut.
    same = quantization == "int4" and shapes is ALIGNED
    assert distance(two, one) < (1e-3 if same else 1.2 * error)


@pytest.mark.parametrize("family", ["qwen3", "mistral-window", "qwen3-moe"])
def test_rounded_kv_of_two_ranks_is_that_of_one(family: str, tmp_path: Path) -> None:
    """Each token and head has a scale of its own, and a head is on one rank."""
    directory = make_model(family, tmp_path / "model")
    one, two = logits_of_all(directory, kv_dtype="int8")
    assert distance(two, one) < 1e-3
    plain, _ = logits_of_all(directory)
    assert distance(one, plain) > 1e-3


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_rounded_experts_are_shared_out(quantization: str, tmp_path: Path) -> None:
    directory = make_model("qwen3-moe", tmp_path / "model")
    plain, _ = logits_of_all(directory)
    one, two = logits_of_all(directory, quantization=quantization)
    # Not as near to each other as dense ones are: a token may go to another expert.
    bound = {"int8": 0.2, "w8a8": 0.2, "int4": 0.5}[quantization]
    assert 1e-3 < distance(one, plain) < bound
    assert 1e-3 < distance(two, plain) < bound


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "kv_memory", "micro_batch_rows"),
    [
        ("none", "int8", "xtensor", 2),
        ("int8", "auto", "paged", 2),
        ("int8", "int8", "xtensor", 0),
        ("int4", "auto", "xtensor", 2),
        ("int4", "int8", "paged", 0),
        ("w8a8", "auto", "xtensor", 0),
        ("w8a8", "int8", "paged", 2),
    ],
)
def test_tokens_do_not_depend_on_chunks_neighbours_and_prefixes(
    quantization: str, kv_dtype: str, kv_memory: str, micro_batch_rows: int
) -> None:
    """Every two of these values stand together somewhere."""
    driver = rank_driver(
        DEMO,
        quantization=quantization,
        kv_dtype=kv_dtype,
        kv_memory=kv_memory,
        micro_batch_rows=micro_batch_rows,
    )
    assert "/tp-2/" in driver.ready.fingerprint
    check_tokens(driver)
    driver.executor.close()
