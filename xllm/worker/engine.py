"""The engine of a worker: runs jobs (plans, loads, pings) one at a time, in order.

Two ways with one face: `ThreadEngine` runs them on a thread of its own, so that the actor's loop
goes on with pulses while a step computes; `InlineEngine` runs them at once on the caller's loop,
for an executor whose steps cost less than the hop to a thread and back (20 us on an idle core,
more on busy ones). It knows neither sockets nor the master. Invariant: every job is answered
exactly once (a load also by progress), and an exception of the executor is an answer, never the
end of the thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

import msgspec

from xllm.errors import EngineError, XllmError
from xllm.protocol.step import (
    LoadModel,
    LoadProgress,
    ModelAwake,
    PingWorker,
    RankNotice,
    SleepModel,
    StepPlan,
    WakeModel,
    WorkerFailed,
    WorkerMessage,
    WorkerPong,
    WorkerReady,
)
from xllm.protocol.transport.context import describe_error
from xllm.worker.executor import Executor, LoadObserver
from xllm.worker.rank_board import RankBoard

EngineJob = StepPlan | LoadModel | PingWorker | RankBoard | SleepModel | WakeModel
"""A board: load, then meet the other ranks by it."""
EngineAnswer = tuple[WorkerMessage, tuple[bytes, ...], XllmError | None]
"""A message for the master, its frames, and the error behind a WorkerFailed."""

PROGRESS_PERIOD_S = 0.1
MEETING_S = 60.0
"""What a rank that could not meet the others waits for their next meeting."""


class Engine(Protocol):
    """What the worker's actor needs of an engine."""

    @property
    def counter(self) -> int:
        """The executor's progress counter."""

    @property
    def busy(self) -> bool:
        """Whether a job is running or waits."""

    def start(self) -> None:
        """Begin to take jobs."""

    def submit(self, job: EngineJob) -> None:
        """Run `job` after those before it; its answers go to `deliver`, on the loop."""

    async def stop(self, timeout_s: float) -> bool:
        """Finish the jobs that were submitted, close the executor. False: it took too long."""


class JobRunner:
    """Turns a job into answers. Makes the executor with the first load, on the thread that runs
    the jobs: imports and devices belong to it."""

    def __init__(
        self, make: Callable[[], Executor], rank: int, meeting_s: float = MEETING_S
    ) -> None:
        self._make = make
        self._rank = rank
        self._meeting_s = meeting_s
        self._executor: Executor | None = None
        self._ended_ns = 0  # when the last step ended; 0: there was none

    @property
    def counter(self) -> int:
        """The executor's progress counter; 0 while there is none."""
        return 0 if self._executor is None else self._executor.counter

    def arrive(self, job: EngineJob) -> None:
        """A job waits for its turn. On another thread than `run`."""
        if self._executor is not None and isinstance(job, StepPlan):
            self._executor.arrive(job)

    def run(self, job: EngineJob, answer: Callable[[EngineAnswer], None]) -> None:
        """Run one job; whatever it raises becomes a WorkerFailed."""
        try:
            if isinstance(job, StepPlan):
                answer(self._step(job))
            elif isinstance(job, LoadModel):
                answer((self._load(answer), (), None))
            elif isinstance(job, RankBoard):
                answer((self._meet(job, answer), (), None))
            elif isinstance(job, SleepModel):
                self._loaded().sleep(job.model, job.drop_weights)
            elif isinstance(job, WakeModel):
                answer((self._wake(job, answer), (), None))
            else:
                answer((WorkerPong(self._rank, job.nonce), (), None))
        except Exception as error:
            answer(self._failure(error, job))

    def close(self) -> None:
        """Close the executor."""
        if self._executor is not None:
            self._executor.close()

    def _step(self, plan: StepPlan) -> EngineAnswer:
        executor = self._loaded()
        idle_ns = time.perf_counter_ns() - self._ended_ns if self._ended_ns else 0
        try:
            output = executor.execute(plan)
        finally:
            self._ended_ns = time.perf_counter_ns()
        result = msgspec.structs.replace(output.result, idle_ns=idle_ns, model=plan.model)
        return result, output.frames, None

    def _loaded(self) -> Executor:
        if self._executor is None:
            raise EngineError("a plan came before the model was loaded")
        return self._executor

    def _wake(self, job: WakeModel, answer: Callable[[EngineAnswer], None]) -> ModelAwake:
        """What stands in the way of one model is no failure of the others."""
        try:
            self._loaded().wake(job.model, self._observer(answer))
        except XllmError as error:
            return ModelAwake(self._rank, job.model, error.code, error.message)
        finally:
            self._ended_ns = 0
        return ModelAwake(self._rank, job.model)

    def _observer(self, answer: Callable[[EngineAnswer], None]) -> LoadObserver:
        """Tells the master of loading, now and then."""
        next_at = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal next_at
            now = time.monotonic()
            if now >= next_at or done == total:
                next_at = now + PROGRESS_PERIOD_S
                answer((LoadProgress(done, total), (), None))

        return progress

    def _load(self, answer: Callable[[EngineAnswer], None]) -> WorkerReady:
        if self._executor is None:
            self._executor = self._make()
        self._ended_ns = 0
        return self._executor.load(self._observer(answer))

    def _meet(self, board: RankBoard, answer: Callable[[EngineAnswer], None]) -> WorkerReady:
        """Load and meet. Where another meeting takes the place of this one, its end is no failure
        of ours: the answer bears the old name, for which nobody waits."""
        ready = msgspec.structs.replace(self._load(answer), group=board.group)
        assert self._executor is not None

        def tell(key: str, value: bytes) -> None:
            answer((RankNotice(self._rank, board.group, key, value), (), None))

        board.open(tell)
        try:
            self._executor.join(board)
        except EngineError:
            # A rank that was lost: the others are called together again once it is back.
            if not board.is_closed_within(self._meeting_s):
                raise
        return ready

    def _failure(self, error: Exception, job: EngineJob) -> EngineAnswer:
        step, model = (job.step, job.model) if isinstance(job, StepPlan) else (-1, "")
        known = error
        if not isinstance(known, XllmError):
            cls = EngineError if step >= 0 else XllmError
            known = cls(describe_error(error))
            known.__cause__ = error
        return WorkerFailed(self._rank, known.code, known.message, step, model), (), known


class InlineEngine:
    """Runs each job inside `submit`."""

    busy = False

    def __init__(self, runner: JobRunner, deliver: Callable[[EngineAnswer], None]) -> None:
        self._runner = runner
        self._deliver = deliver

    @property
    def counter(self) -> int:
        """The executor's progress counter."""
        return self._runner.counter

    def start(self) -> None:
        """Nothing to begin."""

    def submit(self, job: EngineJob) -> None:
        """Run the job and deliver its answers before returning."""
        self._runner.run(job, self._deliver)

    async def stop(self, timeout_s: float) -> bool:
        """Close the executor."""
        self._runner.close()
        return True


class ThreadEngine:
    """Runs jobs on a daemon thread; answers come back to the loop, several in one go."""

    def __init__(self, runner: JobRunner, deliver: Callable[[EngineAnswer], None]) -> None:
        self._runner = runner
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[EngineJob | None] = SimpleQueue()
        self._answers: deque[EngineAnswer] = deque()
        self._wake_scheduled = False
        self._num_submitted = 0
        self._num_done = 0
        self._finished = asyncio.Event()
        self._abandoned = False  # nobody waits for answers any more, the loop may be closed
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    @property
    def counter(self) -> int:
        """The executor's progress counter."""
        return self._runner.counter

    @property
    def busy(self) -> bool:
        """Whether a job is running or waits."""
        return self._num_done < self._num_submitted

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: EngineJob) -> None:
        """Queue the job for the thread."""
        self._num_submitted += 1
        self._runner.arrive(job)
        self._jobs.put(job)

    async def stop(self, timeout_s: float) -> bool:
        """Let the thread finish its jobs and close the executor."""
        if not self._thread.is_alive():
            return True
        self._jobs.put(None)
        try:
            async with asyncio.timeout(timeout_s):
                await self._finished.wait()
        except TimeoutError:
            self._abandoned = True
            return False
        self._thread.join()
        return True

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._runner.run(job, self._answer)
            self._num_done += 1
        try:
            self._runner.close()
        finally:
            if not self._abandoned:
                self._loop.call_soon_threadsafe(self._finished.set)

    def _answer(self, answer: EngineAnswer) -> None:
        if self._abandoned:
            return
        # Appended before the flag is read, and the loop clears the flag before it empties the
        # deque: an answer is either seen by the wake-up under way or schedules its own.
        self._answers.append(answer)
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._wake_scheduled = False
        while self._answers:
            self._deliver(self._answers.popleft())
