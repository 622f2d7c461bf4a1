"""Logits of a model that two or more ranks compute together against one rank's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import FAMILIES, make_model
from tests.worker.collectives.rank_threads import on_all, wired_boards
from tests.worker.native.model_runner import Runner
from tests.worker.native.plan_driver import KERNELS, random_prompts
from tests.worker.native.test_native_logits import LENGTH, blocks
from xllm.errors import ConfigError
from xllm.worker.attention.plan import Span
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.execution.loading import load_model
from xllm.worker.execution.rank_head import RankHead
from xllm.worker.platform.selection import select_platform

VARIANTS = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
    "a head of its own": ("llama", {"tie_word_embeddings": False}, 2),
    "head and embedding in one": ("qwen3", {"tie_word_embeddings": True}, 2),
    "a vocabulary that does not divide": ("qwen3", {"vocab_size": 515}, 2),
    "one kv head for two ranks": ("llama", {"num_key_value_heads": 1}, 2),
    "four ranks, two kv heads": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 72},
        4,
    ),
    "some layers have experts": ("qwen3-moe", {"mlp_only_layers": [1]}, 2),
    "window": ("mistral-window", {}, 2),
}


class RankRunners:
    """The ranks of one model, each a Runner on a thread of its own."""

    def __init__(self, directory: Path, size: int, micro_batch_rows: int = 0, **more: str) -> None:
        self.size = size
        self.group = [
            GlooRanks(rank, size, "127.0.0.1", 30.0, lambda: None) for rank in range(size)
        ]
        self.runners = [
            Runner(directory, rank=rank, num_ranks=size, **more) for rank in range(size)
        ]
        for runner, ranks in zip(self.runners, self.group, strict=True):
            runner.loop.share(ranks, micro_batch_rows)
            loaded = runner.loaded
            vocab_size = loaded.model.config.vocab_size
            head = RankHead(loaded.model.head, ranks, loaded.head_rows, vocab_size)
            runner.head = functools.partial(whole_logits, head)
        boards = wired_boards(size)
        on_all(size, lambda rank: self.group[rank].join(boards[rank]))

    def logits(self, spans: list[Span], token_ids: list[int], single: bool = False) -> torch.Tensor:
        """Those of all ranks, which must have the same bits."""
        first, *others = on_all(
            self.size, lambda rank: self.runners[rank].logits(spans, token_ids, single)
        )
        assert all(torch.equal(first, other) for other in others)
        return first

    def close(self) -> None:
        on_all(self.size, lambda rank: self.group[rank].leave())


def whole_logits(head: RankHead, hidden: torch.Tensor) -> torch.Tensor:
    """Of rows of the last layer's output."""
    return head.whole(head.part(hidden))


@contextlib.contextmanager
def ranks_of(directory: Path, size: int, micro_batch_rows: int = 0, **more: str) -> Iterator:
    runners = RankRunners(directory, size, micro_batch_rows, **more)
    try:
        yield runners
    finally:
        runners.close()


def steps(ids: list[int]) -> list[tuple[list[Span], list[int]]]:
    """A prompt whole, and in chunks beside decodes and another prompt."""
    other = ids[::-1]
    return [
        ([Span(0, LENGTH, blocks(0))], ids),
        ([Span(0, 37, blocks(16)), Span(0, 5, blocks(32))], [*ids[:37], *other[:5]]),
        (
            [Span(37, 20, blocks(16)), Span(5, 1, blocks(32)), Span(LENGTH - 1, 1, blocks(0))],
            [*ids[37:57], other[5], ids[-1]],
        ),
        ([Span(6, 1, blocks(32))], [other[6]]),
    ]


def check_like_one_rank(directory: Path, size: int, rows: int = 0, **more: str) -> None:
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    one = Runner(directory, **more)
    with ranks_of(directory, size, rows, **more) as several:
        for spans, token_ids in steps(ids):
            want = one.logits(spans, token_ids)
            got = several.logits(spans, token_ids)
            assert want.std() > 1
            assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_logits_of_one(family: str, kernels: str, tmp_path: Path) -> None:
    check_like_one_rank(make_model(family, tmp_path), 2, kernels=kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_of_variants(name: str, kernels: str, tmp_path: Path) -> None:
    family, overrides, size = VARIANTS[name]
    check_like_one_rank(make_model(family, tmp_path, **overrides), size, kernels=kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_micro_batches_give_the_same_logits(family: str, kernels: str, tmp_path: Path) -> None:
    check_like_one_rank(make_model(family, tmp_path), 2, rows=1, kernels=kernels)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_a_rows_bits_do_not_depend_on_its_step(family: str, rows: int, tmp_path: Path) -> None:
    """Where the kernels promise that, ranks keep the promise, micro-batches or not."""
    directory = make_model(family, tmp_path, dtype="bfloat16")
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    with ranks_of(directory, 2, rows, dtype="bfloat16") as several:
        if not several.runners[0].loop.batch_invariant:
            pytest.skip("the kernels are not built: torch promises no such thing")
        whole = several.logits([Span(0, LENGTH, blocks(0))], ids)
        for start, end in ((0, 7), (7, 8), (8, 50), (50, LENGTH)):
            spans = [Span(start, end - start, blocks(16)), Span(0, 3, blocks(48))]
            got = several.logits(spans, [*ids[start:end], *ids[-3:]])
            assert torch.equal(got[: end - start], whole[start:end])


def test_ranks_hold_their_parts_alone(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path)
    one = Runner(directory)
    with ranks_of(directory, 2) as several:
        for runner in several.runners:
            assert runner.pool.layout.num_kv_heads * 2 == one.pool.layout.num_kv_heads
            assert runner.loaded.model.kv_groups[0].num_kv_heads == runner.pool.layout.num_kv_heads
            assert runner.loaded.num_bytes < 0.6 * one.loaded.num_bytes
            assert runner.loaded.revision == one.loaded.revision


@pytest.mark.parametrize(
    ("overrides", "size", "word"),
    [
        ({}, 3, "num_attention_heads"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
            2,
            "key_value_heads",
        ),
        ({"intermediate_size": 95}, 2, "intermediate_size"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    overrides: dict, size: int, word: str, tmp_path: Path
) -> None:
    directory = make_model("llama", tmp_path, **overrides)
    with pytest.raises(ConfigError, match=word):
        Runner(directory, rank=0, num_ranks=size)


def test_models_of_the_library_run_on_one_rank(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="by way of transformers"):
        load_model(
            directory,
            "auto",
            select_platform("cpu"),
            lambda loaded, total: None,
            "transformers",
            num_ranks=2,
        )
