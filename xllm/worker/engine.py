"""The engine of a worker: runs jobs (plans, loads, pings) one at a time, in order.

Two ways with one face: `ThreadEngine` runs them on a thread of its own, so that the actor's loop
goes on with pulses while a step computes; `InlineEngine` runs them at once on the caller's loop,
for an executor whose steps cost less than the hop to a thread and back (20 us on an idle core,
more on busy ones). Invariant: every job is answered, and no failure of one is the end of the
thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from xllm.worker.job_runner import EngineAnswer, EngineJob, JobRunner


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
        return self._num_done < self._num_submitted or self._runner.num_under_way > 0

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
