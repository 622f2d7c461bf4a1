"""Steps on a device that runs on: launched before the last one is known, answered in order."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import EngineError
from xllm.protocol.step import (
    LoadModel,
    PingWorker,
    StepPlan,
    StepResult,
    WorkerFailed,
    WorkerPong,
    WorkerReady,
)
from xllm.worker.engine import ThreadEngine
from xllm.worker.executor import DoneStep, StepOutput
from xllm.worker.job_runner import JobRunner

READY = WorkerReady(0, "m", 8, 16, 128, 32, (1,), "r", "f")
PATIENCE_S = 30


class Launched:
    """A step that is done when the test says so."""

    def __init__(self, plan, error=None):
        self.plan = plan
        self.error = error
        self.event = threading.Event()

    @property
    def is_done(self):
        return self.event.is_set()

    def wait(self):
        assert self.event.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return StepOutput(StepResult(self.plan.step, ((7,),), 1000))


class Device:
    """A LaunchingExecutor. Steps in `at_once` are done as they are launched; those in `refused`
    cannot be launched, those in `broken` fail on the device."""

    counter = 0

    def __init__(self, at_once=(), refused=(), broken=()):
        self.at_once = set(at_once)
        self.refused = set(refused)
        self.broken = set(broken)
        self.launched: dict[int, Launched] = {}
        self.closed_with: int | None = None

    def load(self, progress):
        return READY

    def launch(self, plan):
        if plan.step in self.refused:
            raise EngineError(f"step {plan.step} is refused")
        if plan.step in self.at_once:
            return DoneStep(StepOutput(StepResult(plan.step, ((7,),), 1000)))
        error = EngineError(f"step {plan.step} broke") if plan.step in self.broken else None
        step = self.launched[plan.step] = Launched(plan, error)
        return step

    def execute(self, plan):
        return self.launch(plan).wait()

    def arrive(self, plan):
        pass

    def join(self, board):
        raise NotImplementedError

    def sleep(self, model, drop_weights):
        raise NotImplementedError

    def wake(self, model, progress):
        raise NotImplementedError

    def close(self):
        self.closed_with = len([s for s in self.launched.values() if not s.is_done])


def runner_of(device):
    runner = JobRunner(lambda: device, 0)
    answers: list = []
    runner.run(LoadModel(), answers.append)
    assert answers.pop()[0] == READY
    return runner, answers


def name(answer):
    message = answer[0]
    if isinstance(message, WorkerPong):
        return "pong"
    return ("failed" if isinstance(message, WorkerFailed) else "done"), message.step


def test_a_step_is_launched_while_the_one_before_it_runs():
    device = Device()
    runner, answers = runner_of(device)
    runner.run(StepPlan(1), answers.append)
    runner.run(StepPlan(2), answers.append)
    assert runner.num_under_way == 2
    assert not answers
    device.launched[2].event.set()
    device.launched[1].event.set()
    runner.close()
    assert [name(a) for a in answers] == [("done", 1), ("done", 2)]
    assert device.closed_with == 0
    assert runner.num_under_way == 0


def test_what_is_done_at_once_is_answered_at_once():
    runner, answers = runner_of(Device(at_once={1, 2}))
    before = threading.active_count()
    runner.run(StepPlan(1), answers.append)
    assert [name(a) for a in answers] == [("done", 1)]
    runner.run(StepPlan(2), answers.append)
    assert threading.active_count() == before  # nobody has to wait
    assert answers[1][0].idle_ns > 0
    runner.close()


def test_a_device_that_is_not_left_waiting_was_not_idle():
    device = Device()
    runner, answers = runner_of(device)
    for step in (1, 2):
        runner.run(StepPlan(step), answers.append)
    for step in (1, 2):
        device.launched[step].event.set()
    runner.close()
    assert [a[0].idle_ns for a in answers] == [0, 0]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from(["step", "at_once", "refused", "broken", "ping"]), min_size=1, max_size=12
    )
)
def test_every_job_is_answered_once_and_in_order(kinds):
    numbered = list(enumerate(kinds))
    device = Device(
        *({n for n, kind in numbered if kind == wanted} for wanted in ("at_once", "refused")),
        broken={n for n, kind in numbered if kind == "broken"},
    )
    runner, answers = runner_of(device)
    expected = []
    for number, kind in numbered:
        if kind == "ping":
            # It waits for all before it: they must be able to end.
            for step in device.launched.values():
                step.event.set()
            runner.run(PingWorker(number), answers.append)
            expected.append("pong")
        else:
            runner.run(StepPlan(number), answers.append)
            failed = kind in ("refused", "broken")
            expected.append(("failed" if failed else "done", number))
    for step in device.launched.values():
        step.event.set()
    runner.close()
    assert [name(a) for a in answers] == expected


async def _until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_engine_is_busy_until_the_device_is_done(stop_early):
    async def scenario():
        device, answers = Device(), []
        engine = ThreadEngine(JobRunner(lambda: device, 0), answers.append)
        engine.start()
        engine.submit(LoadModel())
        engine.submit(StepPlan(1))
        await _until(lambda: 1 in device.launched)
        assert engine.busy
        stopping = asyncio.create_task(engine.stop(PATIENCE_S)) if stop_early else None
        device.launched[1].event.set()
        if stopping is None:
            await _until(lambda: not engine.busy)
            stopping = asyncio.create_task(engine.stop(PATIENCE_S))
        assert await stopping
        await _until(lambda: len(answers) == 2)
        assert name(answers[1]) == ("done", 1)
        assert device.closed_with == 0

    asyncio.run(scenario())
