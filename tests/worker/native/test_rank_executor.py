"""Ranks behind the executor interface: the tokens of one rank, and what a rank that fails does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.collectives.rank_threads import on_all, wired_boards
from tests.worker.native.plan_driver import PlanDriver, native_settings, random_prompts
from tests.worker.native.rank_executors import RankExecutors, rank_driver, rank_settings
from tests.worker.native.reference import assert_greedy, load_reference
from tests.worker.native.test_native_scheduler import Instance
from xllm.config.master import MasterSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError, EngineError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import StepPlan
from xllm.worker.collectives.making import num_threads_each
from xllm.worker.execution.native import NativeExecutor

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("ranks") / "model")


@pytest.fixture
def driver(directory: Path) -> Iterator[PlanDriver]:
    driver = rank_driver(directory)
    yield driver
    driver.executor.close()


@pytest.mark.parametrize("rows", [0, 2], ids=["whole steps", "micro-batches"])
@pytest.mark.parametrize("memory", ["xtensor", "paged"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3-moe"])
def test_a_scheduled_instance_gives_the_models_tokens(
    family: str, memory: str, rows: int, tmp_path: Path
) -> None:
    """Chunked prefill, prefix hits, decodes beside prefills, with slots and without."""
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    directory = make_model(family, tmp_path, **biases)
    driver = rank_driver(directory, kv_memory=memory, micro_batch_rows=rows)
    ready = driver.ready
    assert (ready.num_slots > 0) == (memory == "xtensor")
    instance = Instance(
        directory,
        driver=driver,
        max_num_batched_tokens=37,
    )
    prompts = random_prompts(6, 1, 90)
    prompts += [prompts[0] * 3, [*prompts[0] * 3, 7]]  # one continues the other
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
    for number, prompt in enumerate(prompts):
        instance.admit(str(number), prompt, sampling)
        instance.step()
    instance.run()
    reference = load_reference(directory)
    for number, prompt in enumerate(prompts):
        stream = instance.streams[str(number), 0]
        assert len(stream) == NUM_TOKENS
        assert assert_greedy(reference, prompt, stream) <= 1
    driver.executor.check()
    driver.executor.close()


def test_drawn_tokens_and_their_scores_are_those_of_one_rank(directory: Path) -> None:
    sampling = SamplingParams(
        temperature=0.9, top_p=0.9, seed=11, logprobs=3, ignore_eos=True, presence_penalty=0.5
    )
    prompts = random_prompts(4, 5, 40)
    streams = []
    for driver in (PlanDriver(directory), rank_driver(directory)):
        jobs = [driver.job(prompt, NUM_TOKENS, sampling) for prompt in prompts]
        driver.generate(jobs)
        streams.append([job.output for job in jobs])
        driver.executor.close()
    assert streams[0] == streams[1]


def test_penalties_over_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path / "model", vocab_size=515)
    sampling = SamplingParams(
        temperature=0.0, ignore_eos=True, repetition_penalty=1.2, logit_bias={5: 3.0}
    )
    streams = []
    for driver in (PlanDriver(directory), rank_driver(directory)):
        jobs = [driver.job(prompt, 8, sampling) for prompt in random_prompts(2, 5, 20)]
        driver.generate(jobs)
        streams.append([job.output for job in jobs])
        driver.executor.close()
    assert streams[0] == streams[1]


def test_what_ranks_report(directory: Path, driver: PlanDriver) -> None:
    one = PlanDriver(directory)
    assert driver.ready.vocab_size == one.ready.vocab_size
    assert driver.ready.revision == one.ready.revision
    assert "/tp-2/" in driver.ready.fingerprint
    assert "/tp-1/" in one.ready.fingerprint
    (group,), (whole,) = driver.ready.kv_groups, one.ready.kv_groups
    assert group.bytes_per_token * 2 == whole.bytes_per_token
    # The same bytes of KV on each rank hold twice as many blocks.
    assert driver.ready.num_blocks >= 2 * one.ready.num_blocks - 1
    one.executor.close()


def spoil_next_step(rank: NativeExecutor) -> None:
    """Rank 1's next step breaks off between two layers."""

    class Breaks:
        def before_layer(self, index: int) -> None:
            if index == 1:
                rank._hooks = rank._hooks[:-1]
                raise RuntimeError("a layer broke")

        def after_layer(self, index: int, hidden: torch.Tensor) -> None:
            """It does not come so far."""

    rank._hooks = (*rank._hooks, Breaks())


def test_a_step_that_fails_on_one_rank_frees_the_others_and_they_go_on(driver: PlanDriver) -> None:
    executors = driver.executor
    assert isinstance(executors, RankExecutors)
    (prompt,) = random_prompts(1, 20, 20)
    (first,) = [driver.job(prompt, 4)]
    driver.generate([first])
    driver.release([first])
    job = driver.job(prompt, 4)
    plan = StepPlan(50, (driver.item(job, 99),), driver.news([job]))
    spoil_next_step(executors.ranks[1])

    def fail(rank: int) -> str:
        with pytest.raises((EngineError, RuntimeError)) as found:
            executors.ranks[rank].execute(plan)
        # Until they meet again no step runs: it would lack the other's part.
        with pytest.raises(EngineError, match=r"have parted|a collective of the ranks failed"):
            executors.ranks[rank].execute(StepPlan(51, plan.items))
        return str(found.value)

    waiting, broken = on_all(2, fail)
    assert broken == "a layer broke"
    assert "a collective" in waiting
    executors.load(lambda done, total: None)
    driver.ended.clear()
    again = driver.job(prompt, 4)
    driver.generate([again])
    assert again.output == first.output


def test_ranks_that_are_asked_for_different_steps_find_out(driver: PlanDriver) -> None:
    executors = driver.executor
    assert isinstance(executors, RankExecutors)
    job = driver.job((5, 6, 7), 2)
    new = driver.news([job])
    plans = [StepPlan(7, (driver.item(job, 99),), new), StepPlan(7, (driver.item(job, 2),), new)]

    def differ(rank: int) -> None:
        with pytest.raises(EngineError, match=r"rank \d is at \[7, "):
            executors.ranks[rank].execute(plans[rank])

    on_all(2, differ)


def test_one_rank_has_nobody_to_meet(directory: Path) -> None:
    executor = PlanDriver(directory).executor
    with pytest.raises(EngineError, match="no other ranks"):
        executor.join(wired_boards(1)[0])
    executor.close()


def test_a_rank_beyond_their_number_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"worker\.rank 2 of master\.num_workers 2"):
        NativeExecutor(rank_settings(native_settings(directory), 2, 2))


def test_ranks_that_are_started_together_share_the_cores(monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))

    def threads(num_workers: int, num_threads: int = 0, spawn: bool = True) -> int:
        return num_threads_each(
            Settings(
                master=MasterSettings(num_workers=num_workers, spawn_workers=spawn),
                worker=WorkerSettings(num_threads=num_threads),
            )
        )

    assert [threads(count) for count in (1, 2, 4, 8)] == [0, 3, 1, 1]
    assert threads(2, 5) == 5
    assert threads(2, spawn=False) == 0
