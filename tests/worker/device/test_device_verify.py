"""Drafts on a device that computes behind the host's back: verified by launched steps, captured or
not, beside prompts and decodes; the tokens are those of the plain executor without drafts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import make_model
from tests.worker.device.interpreted import interpreted_driver
from tests.worker.device.test_device_executor import MODES, LaunchedInstance, sampling_of, serve
from tests.worker.known_drafts import AllDrafts, KnownDrafts
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.test_native_scheduler import Instance
from tests.worker.native.test_native_verify import verify_item
from xllm.protocol.step import ItemKind, MapPages, NewSequence, StepItem, StepPlan
from xllm.worker.graphs.choice import GraphMode


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("device-verified"))


@pytest.fixture(scope="module", params=["device", "host"])
def expected(request, directory):
    """What is asked for, and the plain executor's answer to it."""
    instance = Instance(directory, driver=PlanDriver(directory, kernels="torch"))
    return request.param, dict(serve(instance, request.param))


def drafted(monkeypatch, directory, streams, *, wrong=0.2, limits=None, **worker):
    driver = interpreted_driver(monkeypatch, directory, draft_tokens=4, **worker)
    proposer = KnownDrafts(streams, wrong)
    return LaunchedInstance(directory, driver, proposer=proposer, **(limits or {}))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_without_drafts(directory, monkeypatch, expected, mode, depth):
    kind, streams = expected
    limits = {"max_in_flight": depth, "max_num_batched_tokens": 29}
    instance = drafted(monkeypatch, directory, streams, limits=limits, **MODES[mode])
    assert serve(instance, kind) == streams
    stats = instance.scheduler.statistics()
    assert 0 < stats.num_accepted_drafts < stats.num_drafts
    assert bool(instance.found.num_host_draws) == (kind == "host")
    # What is verified is not planned ahead; all others are.
    assert (instance.most_under_way > 1) == (depth > 1)
    instance.close()


def test_steps_that_verify_alike_are_captured(directory, monkeypatch):
    """Sequences with equally many drafts are one graph, that of their number of rows."""
    prompts = random_prompts(3, 4, 12, seed=3)

    def ask(instance):
        for number, prompt in enumerate(prompts):
            instance.admit(f"r{number}", prompt, sampling_of(16, "device"))
        instance.run()
        return instance.streams

    streams = ask(Instance(directory, driver=PlanDriver(directory, kernels="torch")))
    driver = interpreted_driver(monkeypatch, directory, draft_tokens=4, graph_max_batch=4)
    proposer = AllDrafts(streams)
    instance = LaunchedInstance(directory, driver, proposer=proposer, max_in_flight=1)
    assert ask(instance) == streams
    device = instance.driver.executor._engine.device
    keys = {key.rows_each for key in device._runner._static if key.mode == GraphMode.FULL}
    assert keys >= {1, 5}
    assert instance.found.by_mode[GraphMode.FULL] > 1
    stats = instance.scheduler.statistics()
    assert stats.num_accepted_drafts == stats.num_drafts > 20
    instance.close()


def test_kernels_that_are_interpreted_verify_drafts(directory, monkeypatch):
    """Ours, in Triton's interpreter: the several rows of a sequence as decodes."""

    def ask(instance):
        for number, prompt in enumerate(random_prompts(2, 3, 5, seed=3)):
            instance.admit(f"r{number}", prompt, sampling_of(number, "device"))
            instance.step()
        instance.run()
        return instance.streams

    streams = ask(Instance(directory, driver=PlanDriver(directory, kernels="torch")))
    driver = interpreted_driver(
        monkeypatch,
        directory,
        reference=False,
        max_num_seqs=2,
        graph_max_batch=0,
        graph_max_rows=0,
        draft_tokens=2,
    )
    proposer = KnownDrafts(streams)
    instance = LaunchedInstance(directory, driver, proposer=proposer, draft_tokens=2)
    assert ask(instance) == streams
    stats = instance.scheduler.statistics()
    assert 0 < stats.num_accepted_drafts < stats.num_drafts
    instance.close()


def test_nothing_is_launched_behind_drafts_of_a_sequence(directory, monkeypatch):
    """The master does not ask for it; who does fails that sequence alone."""
    driver = interpreted_driver(monkeypatch, directory, draft_tokens=4)
    executor = driver.executor
    jobs = [driver.job(prompt, 9) for prompt in random_prompts(2, 5, 9, seed=8)]
    maps = tuple(MapPages(slot, 0, tuple(job.blocks)) for slot, job in enumerate(jobs))
    news = tuple(
        NewSequence(job.seq, job.prompt, (), job.sampling, 0, tuple(job.blocks), slot=slot)
        for slot, job in enumerate(jobs)
    )
    items = tuple(driver.item(job, 99) for job in jobs)
    plan = StepPlan(1, items, news, maps=maps)
    executor.arrive(plan)
    for job, tokens in zip(jobs, executor.launch(plan).wait().result.tokens, strict=True):
        job.output.extend(tokens)
        job.computed = len(job.prompt)
    first = executor.launch(StepPlan(2, (verify_item(jobs[0], [3, 4]), driver.item(jobs[1], 1))))
    ahead = StepItem(jobs[1].seq, ItemKind.DECODE, len(jobs[1].prompt) + 1, 1)
    second = executor.launch(StepPlan(3, (verify_item(jobs[0], [3, 4]), ahead)))
    assert first.wait().result.failed == ()
    result = second.wait().result
    assert [index for index, _ in result.failed] == [0]
    assert "verifies drafts of it is under way" in result.failed[0][1]
    assert len(result.tokens[1]) == 1
    executor.close()
