"""The best tokens of ranks that have a part of the vocabulary each: those of whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.rank_executors import RankExecutors, rank_driver
from xllm.protocol.sampling import SamplingParams
from xllm.worker.collectives.ranks import FinishedSum
from xllm.worker.execution.rank_head import ModelHead, RankHead
from xllm.worker.sampling.greedy import BestTokens, best_tokens

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
OTHERS = (
    SamplingParams(temperature=0.0, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, ignore_eos=True, seed=3),
    SamplingParams(temperature=0.0, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={5: 3.0}),
)


class OtherRanks:
    """This rank beside others whose parts are known."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.given: list[torch.Tensor] = []
        self.parts: list[torch.Tensor] | None = None

    def agree(self, numbers: Sequence[int]) -> None:
        """They do."""

    def begin_sum(self, part: torch.Tensor) -> FinishedSum:
        raise AssertionError("a head has no sums")

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        self.given.append(part)
        return torch.stack(self.parts or [part] * self.size)


def best_of_ranks(logits: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all of them find, which must be the same."""
    vocab_size = logits.shape[1]
    each = -(-vocab_size // size)
    ranks = [OtherRanks(rank, size) for rank in range(size)]
    heads = [RankHead(ModelHead, one, each, vocab_size) for one in ranks]
    parts = [logits[:, rank * each : (rank + 1) * each] for rank in range(size)]
    for head, part in zip(heads, parts, strict=True):
        head.best(part, best_tokens)
    given = [one.given[0] for one in ranks]
    for one in ranks:
        one.parts = given
    (first, *others) = [
        head.best(part, best_tokens) for head, part in zip(heads, parts, strict=True)
    ]
    for other in others:
        assert all(map(torch.equal, map(torch.nan_to_num, first), map(torch.nan_to_num, other)))
    return first


@st.composite
def few_values(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Logits with many equals, and some that are no numbers."""
    size = draw(st.sampled_from([2, 3, 4]))
    vocab_size = draw(st.one_of(st.integers(size * size, 40), st.integers(2000, 2100)))
    seed = draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(draw(st.sampled_from([(0.0, 1.0), (-1e30, -0.0, 0.0), (-1.0, 2.5, 3.0)])))
    picks = torch.randint(0, len(values), (3, vocab_size), generator=generator)
    logits = values[picks]
    if draw(st.booleans()):
        logits[1, draw(st.integers(0, vocab_size - 1))] = draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf")])
        )
    return logits, size


@given(few_values())
def test_ranks_find_what_one_finds(case: tuple[torch.Tensor, int]) -> None:
    logits, size = case
    want_tops, want = best_tokens(logits)
    tops, ids = best_of_ranks(logits, size)
    assert torch.equal(tops.nan_to_num(7e30), want_tops.nan_to_num(7e30))
    sound = want_tops.isfinite()
    assert torch.equal(ids[sound], want[sound])
    first = (logits == want_tops[:, None]).int().argmax(dim=1)
    assert torch.equal(ids[sound], first[sound])  # the lowest of equals


def test_a_large_id_is_exact() -> None:
    logits = torch.zeros(1, (1 << 24) + 8)
    logits[0, (1 << 24) + 3] = 1.0
    assert best_of_ranks(logits, 2)[1].tolist() == [(1 << 24) + 3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("head") / "model", vocab_size=515)


class Gathering(RankHead):
    """Finds the best among the logits of the whole vocabulary."""

    def best(self, part: torch.Tensor, find: BestTokens) -> tuple[torch.Tensor, torch.Tensor]:
        return find(self.whole(part))


def streams(driver: PlanDriver) -> list[list[int]]:
    """Greedy sequences alone, then beside such as need logits."""
    found = []
    for samplings in ((GREEDY,) * 3, (GREEDY, *OTHERS, GREEDY)):
        prompts = random_prompts(len(samplings), 5, 30)
        jobs = [
            driver.job(prompt, NUM_TOKENS, sampling)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        driver.generate(jobs, chunk=9)
        found += [job.output for job in jobs]
        driver.release(jobs)
    return found


@pytest.mark.parametrize("deterministic", [False, True])
def test_tokens_are_the_same_with_whole_logits(directory: Path, deterministic: bool) -> None:
    drivers = [rank_driver(directory, deterministic=deterministic) for _ in range(2)]
    gathers = [count_numbers(driver) for driver in drivers]
    for rank in drivers[1].executor.ranks:
        rank._loaded().drawer._head.__class__ = Gathering
    on, off = (streams(driver) for driver in drivers)
    one = PlanDriver(directory)
    assert on == off == streams(one)
    exchanged = [sum(numbers) for numbers in gathers]
    assert exchanged[0] < 0.6 * exchanged[1]
    for driver in (*drivers, one):
        driver.executor.close()


def count_numbers(driver: PlanDriver) -> list[int]:
    """How many numbers rank 0 gathers from now on."""
    executors = driver.executor
    assert isinstance(executors, RankExecutors)
    ranks = executors.ranks[0]._ranks
    assert ranks is not None
    seen: list[int] = []
    gather = ranks.gather

    def counted(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.numel())
        return gather(part)

    ranks.gather = counted  # type: ignore[method-assign]
    return seen
