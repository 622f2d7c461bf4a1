"""The native executor on a device that computes behind the host's back: the tokens are those of
the plain executor, whatever is launched how, and however many steps are under way."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fixtures.models import make_model
from tests.worker.device.interpreted import InterpretedPlatform, interpreted_driver
from tests.worker.device.recorded_graphs import RecordedGraphs
from tests.worker.device.reference_ops import ReferenceOps
from tests.worker.graphs.fake_graphs import FakeGraphs
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.test_native_scheduler import Instance
from xllm.errors import ConfigError, DeviceLostError
from xllm.protocol.sampling import SamplingParams
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.graphs.choice import GraphMode

NO_FULL = {"graph_max_batch": 0}
NO_PARTIAL = {"graph_max_rows": 0}
MODES: dict[str, dict[str, Any]] = {
    "graphs": {"graph_max_batch": 8},
    "eager": {**NO_FULL, **NO_PARTIAL},
    "full alone": {"graph_max_batch": 4, **NO_PARTIAL},
    "partial alone": NO_FULL,
}
WANTED = {
    "graphs": GraphMode.FULL,
    "eager": GraphMode.EAGER,
    "full alone": GraphMode.FULL,
    "partial alone": GraphMode.PARTIAL,
}
"""What steps of each run in, beside those whose shape comes for the first time."""
LIMITS: dict[str, dict[str, Any]] = {
    "as is": {},
    "chunked": {"max_num_batched_tokens": 19},
    "one at a time": {"max_in_flight": 1},
    "three at a time": {"max_in_flight": 3},
    "few of all": {"num_blocks": 20, "num_slots": 4, "max_num_batched_tokens": 19},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("device"))


class LaunchedInstance(Instance):
    """Plans are launched as they come; another thread waits for the oldest one, as in a worker."""

    def __init__(self, directory, driver, **limits):
        super().__init__(directory, driver=driver, **limits)
        self.launched: deque = deque()
        self.most_under_way = 0
        self.collector = ThreadPoolExecutor(1)

    def step(self) -> bool:
        executor = self.driver.executor
        while (plan := self.scheduler.schedule(self.now + 0.01)) is not None:
            executor.arrive(plan)
            launched = executor.launch(plan)
            self.launched.append(launched)
            self.most_under_way = max(self.most_under_way, len(self.launched))
        if self.launched:
            oldest = self.launched.popleft()
            self.in_flight.append(self.collector.submit(oldest.wait).result())
        return super().step()

    @property
    def found(self):
        assert isinstance(self.driver.executor, NativeExecutor)
        return self.driver.executor.statistics().device

    def close(self) -> None:
        self.collector.shutdown()
        self.driver.executor.close()


def sampling_of(number: int, kind: str) -> SamplingParams:
    """Greedy and sampled by turns; `host`: some ask for what only the host can draw."""
    more: dict[str, Any] = {}
    if kind == "host" and number % 3 == 0:
        more = {"presence_penalty": 0.7, "n": 2}
    elif kind == "host" and number % 3 == 1:
        more = {"logprobs": 2}
    return SamplingParams(
        temperature=float(number % 2), seed=number, max_tokens=5 + number, ignore_eos=True, **more
    )


def serve(instance: Instance, kind: str = "device") -> dict:
    """Requests that come while others run, some of which begin alike."""
    rng = random.Random(5)
    prefix = random_prompts(1, 20, 20, seed=4)[0]
    for number, prompt in enumerate(random_prompts(6, 2, 30, seed=3)):
        begun = [*prefix, *prompt] if number % 2 else prompt
        instance.admit(f"r{number}", begun, sampling_of(number, kind))
        for _ in range(rng.randrange(4)):
            instance.step()
    instance.run()
    return instance.streams


@pytest.fixture(scope="module", params=["device", "host"])
def expected(request, directory):
    """What is asked for, and the plain executor's answer to it."""
    instance = Instance(directory, driver=PlanDriver(directory, kernels="torch"))
    return request.param, serve(instance, request.param)


def launched(monkeypatch, directory, limits=None, platform=None, **worker):
    driver = interpreted_driver(monkeypatch, directory, platform, **worker)
    return LaunchedInstance(directory, driver, **(limits or {}))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_plain_executor(directory, monkeypatch, expected, mode, limits):
    kind, streams = expected
    instance = launched(monkeypatch, directory, LIMITS[limits], **MODES[mode])
    assert serve(instance, kind) == streams
    found = instance.found
    assert (instance.most_under_way > 1) == (limits != "one at a time")
    assert bool(found.num_host_draws) == (kind == "host")
    used = {name for name, count in found.by_mode.items() if count}
    assert used & {GraphMode.FULL, GraphMode.EAGER, WANTED[mode]} == {GraphMode.EAGER, WANTED[mode]}
    assert mode != "eager" or found.graphs is None
    instance.close()


@pytest.mark.parametrize("limits", ["as is", "three at a time"])
@pytest.mark.parametrize("mode", ["graphs", "full alone", "partial alone"])
def test_what_is_captured_reads_nothing_but_tensors_that_stay(
    directory, monkeypatch, expected, mode, limits
):
    """The draws of decodes included: a replay runs no Python, so that it knows nothing of a step
    but what its tensors say."""
    kind, streams = expected
    platform = InterpretedPlatform(graphs=RecordedGraphs())
    instance = launched(monkeypatch, directory, LIMITS[limits], platform, **MODES[mode])
    assert serve(instance, kind) == streams
    found = instance.found
    assert found.by_mode[WANTED[mode]] > 0
    assert found.graphs.num_replays > 0
    assert bool(found.num_drawn_whole) == (mode != "partial alone")
    if kind == "device":
        assert found.num_drawn_whole == found.by_mode[GraphMode.FULL]
    instance.close()


def test_kernels_that_are_interpreted_give_the_same_tokens(directory, monkeypatch):
    def ask(instance):
        for number, prompt in enumerate(random_prompts(3, 3, 20, seed=3)):
            instance.admit(f"r{number}", prompt, sampling_of(number, "device"))
            instance.step()
        instance.run()
        return instance.streams

    wanted = ask(Instance(directory, driver=PlanDriver(directory, kernels="torch")))
    driver = interpreted_driver(
        monkeypatch, directory, reference=False, max_num_seqs=4, graph_max_batch=2
    )
    instance = LaunchedInstance(directory, driver)
    assert ask(instance) == wanted
    assert min(instance.found.by_mode.values()) > 0
    instance.close()


def test_captures_that_fail_leave_steps_eager(directory, monkeypatch):
    platform = InterpretedPlatform(failing={""})
    instance = launched(monkeypatch, directory, platform=platform)
    plain = Instance(directory, driver=PlanDriver(directory, kernels="torch"))
    assert serve(instance) == serve(plain)
    found = instance.found
    assert found.graphs.num_failed > 0
    assert found.graphs.num_graphs == found.by_mode[GraphMode.FULL] == found.num_drawn_whole == 0
    instance.close()


@pytest.mark.parametrize("kernel", ["attend_prompts", "norm"])
def test_sizes_that_the_kernels_refuse_leave_torch(directory, monkeypatch, kernel):
    def refuse(*args):
        raise ConfigError("no such head")

    plain = Instance(directory, driver=PlanDriver(directory, kernels="torch"))
    monkeypatch.setattr(ReferenceOps, kernel, refuse)
    instance = launched(monkeypatch, directory)
    assert instance.found is None
    assert "torch-sdpa" in instance.driver.ready.fingerprint
    assert serve(instance) == serve(plain)
    instance.close()


def test_its_fingerprint_names_its_kernels(directory, monkeypatch):
    driver = interpreted_driver(monkeypatch, directory)
    assert "triton-1" in driver.ready.fingerprint
    driver.executor.close()


@pytest.mark.parametrize("drop_weights", [False, True])
def test_it_sleeps_and_wakes_between_steps(directory, monkeypatch, drop_weights):
    platform = InterpretedPlatform()
    instance = launched(monkeypatch, directory, platform=platform)
    first = dict(serve(instance))
    executor = instance.driver.executor
    held = platform.host.used_bytes
    trimmed = []
    monkeypatch.setattr(platform, "trim", lambda: trimmed.append(1))
    executor.sleep("", drop_weights)
    assert bool(trimmed) == drop_weights
    assert platform.host.used_bytes < held
    executor.wake("", lambda done, total: None)
    again = LaunchedInstance(directory, instance.driver)
    assert serve(again) == first
    again.close()
    instance.close()
    assert platform.host.used_bytes == 0
    assert isinstance(platform.graph_device, FakeGraphs)
    assert not platform.graph_device.open_graphs()


def break_second_step(model, monkeypatch):
    """The first sequence's numbers of its second step are not finite."""
    head, calls = model.head, []

    def broken(hidden):
        logits = head(hidden)
        calls.append(len(logits))
        if len(calls) == 2:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(model, "head", broken)


def test_a_sequence_whose_numbers_are_not_finite_fails_alone(directory, monkeypatch):
    driver = interpreted_driver(monkeypatch, directory)
    executor = driver.executor
    model = executor._engine.device._runner._model
    break_second_step(model, monkeypatch)
    plans = two_sequences(driver, 4)
    launched_steps = [executor.launch(plan) for plan in plans[:3]]
    results = [step.wait().result for step in launched_steps]
    assert [dict(result.failed).keys() for result in results] == [set(), {0}, {0}]
    later = executor.launch(plans[3]).wait().result
    assert "not a number" in dict(later.failed)[0]
    assert all(len(result.tokens[1]) == 1 for result in (*results, later))
    executor.close()


def test_a_host_draw_behind_a_step_that_failed_fails_too(directory, monkeypatch):
    """Its draws are the host's, so that it is launched before the failure is known."""
    driver = interpreted_driver(monkeypatch, directory)
    executor = driver.executor
    device = executor._engine.device
    model = device._runner._model
    break_second_step(model, monkeypatch)
    plans = two_sequences(driver, 2)
    steps = [executor.launch(plan) for plan in plans[:2]]
    monkeypatch.setattr(device, "can_draw", lambda batch: False)
    last = executor.launch(plans[2]).wait().result
    assert [dict(step.wait().result.failed).keys() for step in steps] == [set(), {0}]
    assert "not a number" in dict(last.failed)[0]
    assert len(last.tokens[1]) == 1
    executor.close()


def test_an_item_that_cannot_be_built_fails_its_sequence_from_then_on(directory, monkeypatch):
    driver = interpreted_driver(monkeypatch, directory)
    executor = driver.executor
    plans = two_sequences(driver, 2)
    # The second sequence's pages are not mapped.
    first = msgspec.structs.replace(plans[0], maps=plans[0].maps[:1])
    results = [executor.launch(plan) for plan in (first, plans[1])]
    failed = [dict(step.wait().result.failed) for step in results]
    assert [list(one) for one in failed] == [[1], [1]]
    assert failed[0][1] == failed[1][1]
    executor.close()


def test_a_launch_that_breaks_waits_for_what_was_begun(directory, monkeypatch):
    platform = InterpretedPlatform()
    driver = interpreted_driver(monkeypatch, directory, platform)
    executor = driver.executor
    waited = []
    monkeypatch.setattr(platform, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(executor._engine.device._copier, "copy", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        executor.launch(two_sequences(driver, 1)[0])
    assert waited
    executor.close()


def test_a_launch_that_breaks_with_its_device_says_so(directory, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    platform = InterpretedPlatform()
    driver = interpreted_driver(monkeypatch, directory, platform)
    executor = driver.executor
    monkeypatch.setattr(executor._engine.device._copier, "copy", lambda *args: 1 // 0)
    with monkeypatch.context() as broken:
        broken.setattr(platform, "synchronize", lost)
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            executor.launch(two_sequences(driver, 1)[0])
    executor.close()


def two_sequences(driver, num_steps):
    """Plans of two sequences in slots of their own: a prompt each, then decodes."""
    from benchmarks.step_driver import StepDriver

    steps = StepDriver.__new__(StepDriver)
    steps.executor, steps.ready, steps.ahead = driver.executor, driver.ready, 2
    steps._next_seq, steps._next_step, steps._ended = 0, 0, []
    sequences = steps.sequences([[3, 4, 5], [6, 7, 8]], num_steps + 1)
    plans = list(steps._prefill_plans(sequences, 64))
    return plans + [steps._decode_plan(sequences) for _ in range(num_steps)]
