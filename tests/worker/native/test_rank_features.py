"""Every feature of the engine with two ranks: what it gives is what one rank gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import KERNELS, Job, PlanDriver, random_prompts, scores
from tests.worker.native.rank_executors import RankExecutors, rank_driver
from tests.worker.native.test_native_scheduler import Instance, workload
from tests.worker.native.test_native_vectors import (
    POOLINGS,
    Embedder,
    assert_alike,
    embedder,
    reference_vectors,
    texts_of,
)
from xllm.protocol.sampling import SamplingParams
from xllm.worker.executor import StepOutput

DEMO = Path(__file__).parents[3] / "xllm" / "demo" / "model"
NUM_TOKENS = 16
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "greedy with logprobs": SamplingParams(temperature=0.0, ignore_eos=True, logprobs=4),
    "penalties": SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
    ),
    "bias": SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={3: 4.0, 9: -100.0}),
    "drawn": SamplingParams(temperature=1.0, ignore_eos=True, seed=5),
    "filtered": SamplingParams(
        temperature=0.9, top_k=20, top_p=0.8, min_p=0.01, ignore_eos=True, seed=6, logprobs=0
    ),
    "prompt scored": SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=3),
}


@pytest.fixture(scope="module", params=KERNELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PlanDriver, PlanDriver]]:
    """One rank and two of the demo model."""
    drivers = (PlanDriver(DEMO, kernels=request.param), rank_driver(DEMO, kernels=request.param))
    yield drivers
    for driver in drivers:
        driver.executor.close()


def run_jobs(driver: PlanDriver, samplings: Sequence[SamplingParams]) -> tuple[list, list]:
    """Tokens of a prompt for each sampling, all beside each other; and their logprob tables."""
    prompts = random_prompts(len(samplings), 5, 40)
    jobs = [
        driver.job(prompt, NUM_TOKENS, sampling)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    tables = []
    while not all(job.done for job in jobs):
        output = driver.step(jobs)
        if output.result.num_top >= 0:
            tables.append(scores(output))
    driver.release(jobs)
    return [job.output for job in jobs], tables


def check_pair(pair: tuple[PlanDriver, PlanDriver], samplings: Sequence[SamplingParams]) -> None:
    (want, want_tables), (got, got_tables) = (run_jobs(driver, samplings) for driver in pair)
    assert got == want
    assert len(got_tables) == len(want_tables)
    for mine, theirs in zip(got_tables, want_tables, strict=True):
        assert (mine.ids[:, 0] == theirs.ids[:, 0]).all()
        assert (mine.ranks == theirs.ranks).all()
        there = theirs.ids >= 0
        assert abs(mine.logprobs[there] - theirs.logprobs[there]).max() < 1e-3


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_and_scores_are_those_of_one_rank(pair, name: str) -> None:
    check_pair(pair, [SAMPLINGS[name]] * 3)


def test_all_of_them_in_one_step(pair) -> None:
    check_pair(pair, list(SAMPLINGS.values()) * 2)


@pytest.mark.parametrize("memory", ["xtensor", "paged"])
def test_choices_and_seeds_through_the_scheduler(memory: str) -> None:
    """n > 1 (forks copy blocks on each rank), prefixes in common, preemption."""
    streams = []
    for make in (PlanDriver, rank_driver):
        instance = Instance(DEMO, driver=make(DEMO, kv_memory=memory), num_blocks=18)
        workload(instance)
        assert instance.scheduler.statistics().num_preemptions > 0
        streams.append(instance.streams)
        instance.driver.executor.close()
    assert streams[0] == streams[1]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_of_two_ranks(pooling: str, kernels: str, tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path / "model")
    settings = embedder(directory, pooling, kernels=kernels)
    texts = texts_of(1, 15, 33, 100)
    want = reference_vectors(directory, texts, pooling)
    for budget in (32, 512):
        executors = RankExecutors(settings, 2)
        engine = Embedder(settings, executors, max_num_batched_tokens=budget)
        assert (engine.ready.task, engine.ready.pooling) == ("embed", pooling)
        assert_alike(engine.embed(texts), want)
        executors.close()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_deterministic_ranks(family: str, kernels: str, tmp_path: Path) -> None:
    """Each token's scores have the same bits alone and whole, and beside others in chunks."""
    directory = make_model(family, tmp_path / "model", dtype="bfloat16")
    driver = rank_driver(directory, kernels=kernels, deterministic=True)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0)
    prompts = random_prompts(3, 20, 50)
    found = []
    for together in (False, True):
        jobs = [driver.job(prompt, 6, sampling) for prompt in prompts]
        if together:
            seen = scored(driver, jobs, chunk=13)
        else:
            seen = [one for job in jobs for one in scored(driver, [job])]
        found.append(seen)
    assert found[0] == found[1]
    driver.executor.close()


def scored(driver: PlanDriver, jobs: list[Job], chunk: int = 1 << 20) -> list[list[Any]]:
    """(token, the bits of its score) of each job."""
    seen: dict[int, list[Any]] = {job.seq: [] for job in jobs}
    while not all(job.done for job in jobs):
        running = [job for job in jobs if not job.done]
        lengths = [len(job.output) for job in running]
        output: StepOutput = driver.step(running, chunk)
        pairs = zip(running, lengths, strict=True)
        drew = [job for job, before in pairs if len(job.output) > before]
        if not drew:
            continue
        table = scores(output)
        for job, row in zip(drew, table.logprobs, strict=True):
            seen[job.seq].append((job.output[-1], row[0].tobytes()))
    driver.release(jobs)
    return list(seen.values())
