"""The worker's shell against a fake master, in one process over ipc."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import uvloop

from tests.worker.process.fake_master import FakeMaster
from xllm.config.cluster import ClusterSettings
from xllm.config.master import MasterSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import DependencyError, DeviceLostError, FencedError, InvariantError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import (
    LoadModel,
    LoadProgress,
    NewSequence,
    PingWorker,
    StepItem,
    StepPlan,
    StepResult,
    StopWorker,
    WorkerFailed,
    WorkerHello,
    WorkerPong,
    WorkerReady,
)
from xllm.protocol.transport.context import Transport
from xllm.worker.actor import WorkerActor
from xllm.worker.job_runner import JobRunner
from xllm.worker.toy.executor import make_toy_executor
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.stream import predict

PROMPT = (20, 21, 22)
SEEDED = SamplingParams(seed=3, logprobs=1)


def run(coroutine) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(coroutine, 30))


def settings_for(endpoint: str, step_ms: float = 0.0) -> Settings:
    return Settings(
        cluster=ClusterSettings(heartbeat_s=0.02),
        master=MasterSettings(worker_endpoint=endpoint),
        worker=WorkerSettings(engine="toy", toy_step_ms=step_ms, device="cpu"),
    )


@contextlib.asynccontextmanager
async def running(run_dir, *, step_ms: float = 0.0, make=make_toy_executor):
    """A fake master and a worker that run; gives (master, actor, task of the actor's life)."""
    endpoint = f"ipc://{run_dir}/w"
    transport = Transport()
    master = FakeMaster(transport, endpoint)
    actor = WorkerActor(settings_for(endpoint, step_ms), make)
    life = asyncio.create_task(actor.run())
    try:
        yield master, actor, life
    finally:
        actor.request_stop()
        await life
        master.socket.close()
        transport.close()


def first_plan(step: int = 0, seq: int = 0, prompt=PROMPT) -> StepPlan:
    new = NewSequence(seq, prompt, (), SEEDED, 0)
    return StepPlan(step, (StepItem(seq, 0, 0, len(prompt), (1 + seq,)),), (new,))


@pytest.fixture(params=[0.0, 0.01], ids=["inline", "thread"])
def step_ms(request) -> float:
    return request.param


def test_the_life_of_a_worker(run_dir, step_ms) -> None:
    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms) as (master, _, life):
            ready = await master.wait_for(WorkerReady)
            assert isinstance(master.heard[0], WorkerHello)
            assert master.heard[0].device == "cpu"
            assert ready.num_blocks == 4096
            master.send(first_plan())
            for step in range(1, 9):
                master.send(StepPlan(step, (StepItem(0, 1, len(PROMPT) + step - 1, 1),)))
            master.send(PingWorker(77))
            pong = await master.wait_for(WorkerPong)
            assert pong.nonce == 77
            results = master.of(StepResult)  # the ping went through the engine after the plans
            assert [result.step for result in results] == list(range(9))
            stream = [token for result in results for token in result.tokens[0]]
            assert stream == predict(PROMPT, SEEDED, 0, 9)
            assert len(master.frames[master.heard.index(results[0])]) == 3
            await master.until(lambda: any(pulse.metrics for pulse in master.pulses))
            assert any(b"xllm_worker_steps_total" in pulse.metrics for pulse in master.pulses)
            assert max(pulse.counter for pulse in master.pulses) >= 9
            master.send(StopWorker())
            assert await life == FencedError.exit_code

    run(scenario())


def test_asking_to_load_again(run_dir, step_ms) -> None:
    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms) as (master, _, _):
            await master.wait_for(WorkerReady)
            master.send(LoadModel())
            await master.wait_for(WorkerReady, 2)
            assert len(master.of(LoadProgress)) <= 1  # nothing ran: it was not loaded again
            master.send(first_plan())
            await master.wait_for(StepResult)
            master.send(LoadModel())
            await master.wait_for(WorkerReady, 3)
            master.send(StepPlan(1, (StepItem(0, 1, len(PROMPT), 1),)))
            result = await master.wait_for(StepResult, 2)
            assert "not known" in result.failed[0][1]  # a load forgets all sequences

    run(scenario())


def test_a_failed_step_harms_no_other(run_dir, step_ms) -> None:
    def make(settings):
        return make_toy_executor(settings, ToyFaults(fail_step=6))

    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms, make=make) as (master, _, _):
            await master.wait_for(WorkerReady)
            master.send(first_plan())
            master.send(first_plan(1, seq=1, prompt=(6, 7)))
            master.send(StepPlan(2, (StepItem(0, 1, len(PROMPT), 1),)))
            await master.wait_for(StepResult, 2)
            [failed] = master.of(WorkerFailed)
            assert (failed.step, failed.code) == (1, "engine_error")
            assert "RuntimeError at" in failed.message
            stream = [token for result in master.of(StepResult) for token in result.tokens[0]]
            assert stream == predict(PROMPT, SEEDED, 0, 2)

    run(scenario())


def test_a_hang_shows_in_the_pulses(run_dir) -> None:
    faults = ToyFaults(hang=6)

    async def scenario() -> None:
        make = lambda settings: make_toy_executor(settings, faults)  # noqa: E731
        async with running(run_dir, step_ms=0.01, make=make) as (master, _, _):
            await master.wait_for(WorkerReady)
            await master.until(lambda: master.pulses)
            assert not master.pulses[-1].busy
            master.send(first_plan(prompt=(6, 7)))
            await master.until(lambda: master.pulses[-1].busy)
            stood_from = len(master.pulses)
            await master.until(lambda: len(master.pulses) >= stood_from + 5)
            hung = master.pulses[stood_from:]
            assert all(pulse.busy for pulse in hung)
            assert len({pulse.counter for pulse in hung}) == 1
            faults.released.set()
            await master.wait_for(StepResult)
            await master.until(lambda: not master.pulses[-1].busy)

    run(scenario())


def test_a_load_that_fails_ends_the_process_with_its_code(run_dir, step_ms) -> None:
    def make(settings):
        raise DependencyError("no model at nowhere", param="model.path")

    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms, make=make) as (master, _, life):
            assert await life == DependencyError.exit_code
            failed = await master.wait_for(WorkerFailed)
            assert (failed.step, failed.code) == (-1, "dependency_error")
            assert "nowhere" in failed.message

    run(scenario())


def test_a_broken_invariant_ends_the_process(run_dir, step_ms) -> None:
    class BrokenExecutor:
        counter = 0

        def __init__(self, settings) -> None:
            self.inner = make_toy_executor(settings)

        def load(self, progress):
            return self.inner.load(progress)

        def arrive(self, plan):
            pass

        def execute(self, plan):
            raise InvariantError("two owners of block 3")

        def close(self) -> None:
            self.inner.close()

    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms, make=BrokenExecutor) as (master, _, life):
            await master.wait_for(WorkerReady)
            master.send(first_plan())
            failed = await master.wait_for(WorkerFailed)
            assert (failed.step, failed.code) == (0, "invariant_broken")
            assert await life == 70

    run(scenario())


def test_a_lost_device_ends_the_worker_without_an_answer(run_dir, step_ms) -> None:
    """Its requests then go on elsewhere; an answer would end them."""

    class Lost:
        def __init__(self, settings) -> None:
            self.inner = make_toy_executor(settings)
            self.counter = 0

        def load(self, progress):
            return self.inner.load(progress)

        def arrive(self, plan):
            pass

        def execute(self, plan):
            raise DeviceLostError("the device is lost")

        def close(self) -> None:
            self.inner.close()

    async def scenario() -> None:
        async with running(run_dir, step_ms=step_ms, make=Lost) as (master, _, life):
            await master.wait_for(WorkerReady)
            master.send(first_plan())
            assert await life == 70
            assert not master.of(WorkerFailed)

    run(scenario())


def test_what_is_no_message_of_a_master_is_counted(run_dir) -> None:
    async def scenario() -> None:
        async with running(run_dir, step_ms=0.01) as (master, actor, _):
            await master.wait_for(WorkerReady)
            master.socket.send(master.identity, WorkerPong(0, 1))  # no MasterMessage
            master.send(PingWorker(1))
            await master.wait_for(WorkerPong)
            assert actor.transport.num_handler_errors == 0

    run(scenario())


def test_a_new_master_is_greeted_first(run_dir) -> None:
    async def scenario() -> None:
        async with running(run_dir, step_ms=100) as (master, _, _):
            await master.wait_for(WorkerReady)
            master.send(first_plan())
            master.send(PingWorker(4))
            await master.until(lambda: master.pulses and master.pulses[-1].busy)
            endpoint, transport = master.socket.endpoint, Transport()
            master.socket.close()
            successor = FakeMaster(transport, endpoint)
            try:
                await successor.wait_for(WorkerHello)
                successor.send(LoadModel())
                await successor.wait_for(WorkerReady)
                assert isinstance(successor.heard[0], WorkerHello)
                assert successor.heard[0].incarnation == master.heard[0].incarnation
                successor.send(PingWorker(5))
                successor.send(first_plan(1, seq=0))
                await successor.wait_for(StepResult)
                # The plan and the ping of the master that is gone are answered to nobody.
                assert [pong.nonce for pong in successor.of(WorkerPong)] == [5]
                assert [result.step for result in successor.of(StepResult)] == [1]
            finally:
                successor.socket.close()
                transport.close()

    run(scenario())


def test_progress_is_told_at_most_ten_times_a_second() -> None:
    class SlowLoader:
        counter = 0

        def load(self, progress):
            for done in range(1, 1001):
                progress(done, 1000)
            return make_toy_executor(settings_for("")).load(lambda done, total: None)

    answers = []
    JobRunner(SlowLoader, 0).run(LoadModel(), answers.append)
    *told, ready = [message for message, _, _ in answers]
    assert isinstance(ready, WorkerReady)
    assert 2 <= len(told) <= 4
    assert [told[0], told[-1]] == [LoadProgress(1, 1000), LoadProgress(1000, 1000)]


def test_a_plan_before_the_model_is_answered() -> None:
    answers = []
    JobRunner(lambda: make_toy_executor(settings_for("")), 0).run(first_plan(), answers.append)
    [(failed, frames, error)] = answers
    assert (failed.step, failed.code, frames) == (0, "engine_error", ())
    assert "before the model" in failed.message
    assert failed.message == error.message
