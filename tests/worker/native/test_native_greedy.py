"""Greedy tokens of every family against transformers: 64 tokens over 20 prompts, the executor
driven by step plans in every way that a scheduler may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.models import FAMILIES, make_model
from tests.worker.native.plan_driver import Job, PlanDriver, random_prompts
from tests.worker.native.reference import assert_greedy, load_reference

NUM_PROMPTS = 20
NUM_TOKENS = 64
PREFIX = 40


class Bench:
    """A driver and the oracle of one model; `judge` checks jobs and compares them with what the
    same prompts gave before."""

    def __init__(self, directory: Path) -> None:
        self.driver = PlanDriver(directory)
        self.reference = load_reference(directory)
        self.seen: dict[tuple[int, ...], list[int]] = {}

    def judge(self, jobs: list[Job]) -> None:
        near_ties = 0
        for job in jobs:
            assert len(job.output) == NUM_TOKENS
            known = self.seen.setdefault(job.prompt, job.output)
            if known is job.output or known != job.output:
                near_ties += assert_greedy(self.reference, job.prompt, job.output)
        # About one token in 10,000: more means that the bound hides an error.
        assert near_ties <= 2


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    bench = Bench(make_model(request.param, tmp_path_factory.mktemp(request.param)))
    yield bench
    bench.driver.executor.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(NUM_PROMPTS, 1, 120)


def test_alone(bench: Bench, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        job = bench.driver.job(prompt, NUM_TOKENS)
        bench.driver.generate([job])
        bench.judge([job])
        bench.driver.release([job])


def test_all_in_one_batch(bench: Bench, prompts: list[list[int]]) -> None:
    jobs = [bench.driver.job(prompt, NUM_TOKENS) for prompt in prompts]
    bench.driver.generate(jobs)
    bench.judge(jobs)
    bench.driver.release(jobs)


@pytest.mark.parametrize("chunk", [7, 16, 50])
def test_chunked_prefill_beside_decodes(bench: Bench, prompts: list[list[int]], chunk: int) -> None:
    jobs = [bench.driver.job(prompt, NUM_TOKENS) for prompt in prompts]
    bench.driver.generate(jobs, chunk=chunk, stagger=2)
    bench.judge(jobs)
    bench.driver.release(jobs)


@pytest.mark.parametrize("chunk", [11, 1 << 20])
def test_shared_prefix_blocks(bench: Bench, prompts: list[list[int]], chunk: int) -> None:
    """Prompts that begin alike start behind the blocks that the first of them has filled."""
    prefix = random_prompts(1, PREFIX, PREFIX, seed=3)[0]
    size = bench.driver.ready.block_size
    first = bench.driver.job([*prefix, *prompts[0]], NUM_TOKENS)
    bench.driver.generate([first], chunk=chunk)
    cached = first.blocks[: PREFIX // size]
    assert len(cached) == 2
    jobs = [
        bench.driver.job([*prefix, *prompt], NUM_TOKENS, cached=cached) for prompt in prompts[1:]
    ]
    assert all(job.computed == 2 * size for job in jobs)
    bench.driver.generate(jobs, chunk=chunk, stagger=3)
    bench.judge([first, *jobs])
    bench.driver.release([first])
    bench.driver.release(jobs, shared=cached)


def test_followers_in_the_step_of_their_leader(bench: Bench) -> None:
    """A block may be shared within the step that fills it: rows write before any row reads."""
    size = bench.driver.ready.block_size
    prefix = random_prompts(1, 2 * size, 2 * size, seed=5)[0]
    leader = bench.driver.job([*prefix, 9, 8, 7], NUM_TOKENS)
    follower = bench.driver.job([*prefix, 20, 30], NUM_TOKENS, cached=leader.blocks[:2])
    bench.driver.generate([leader, follower])
    bench.judge([leader, follower])
    bench.driver.release([leader, follower], shared=leader.blocks[:2])
    bench.driver.free.extend(leader.blocks[:2])
