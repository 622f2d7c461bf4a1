"""Runs the jobs of a worker: plans, loads, meetings, sleep and pings become answers.

It knows neither sockets nor the master. Invariant: every job is answered exactly once (a load also
by progress) and in order, and an exception of the executor is an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
from xllm.worker.collector import StepCollector
from xllm.worker.executor import (
    DoneStep,
    Executor,
    LaunchedStep,
    LaunchingExecutor,
    LoadObserver,
    StepOutput,
)
from xllm.worker.rank_board import RankBoard

EngineJob = StepPlan | LoadModel | PingWorker | RankBoard | SleepModel | WakeModel
"""A board: load, then meet the other ranks by it."""
EngineAnswer = tuple[WorkerMessage, tuple[bytes, ...], XllmError | None]
"""A message for the master, its frames, and the error behind a WorkerFailed."""

PROGRESS_PERIOD_S = 0.1
MEETING_S = 60.0
"""What a rank that could not meet the others waits for their next meeting."""


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
        self._launcher: LaunchingExecutor | None = None  # the same, where its device runs on
        self._collector = StepCollector()

    @property
    def counter(self) -> int:
        """The executor's progress counter; 0 while there is none."""
        return 0 if self._executor is None else self._executor.counter

    @property
    def num_under_way(self) -> int:
        """Plans that were launched and are not answered. Any thread may ask."""
        return self._collector.num_under_way

    def arrive(self, job: EngineJob) -> None:
        """A job waits for its turn. On another thread than `run`."""
        if self._executor is not None and isinstance(job, StepPlan):
            self._executor.arrive(job)

    def run(self, job: EngineJob, answer: Callable[[EngineAnswer], None]) -> None:
        """Run one job; whatever it raises becomes a WorkerFailed. A plan may still be under way
        when this returns, its answer comes on another thread then; any other job begins once all
        plans before it are answered."""
        if isinstance(job, StepPlan):
            self._step(job, answer)
            return
        self._collector.drain()
        try:
            if isinstance(job, LoadModel):
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
        """Answer for what is under way, and close the executor."""
        self._collector.close()
        if self._executor is not None:
            self._executor.close()

    def _step(self, plan: StepPlan, answer: Callable[[EngineAnswer], None]) -> None:
        def done(output: StepOutput, idle_ns: int) -> None:
            result = msgspec.structs.replace(output.result, idle_ns=idle_ns, model=plan.model)
            answer((result, output.frames, None))

        began_ns = time.perf_counter_ns()
        launched: LaunchedStep | Exception
        try:
            if self._launcher is not None:
                launched = self._launcher.launch(plan)
            else:
                launched = DoneStep(self._loaded().execute(plan))
        except Exception as error:
            launched = error
        self._collector.put(
            launched, began_ns, done, lambda error: answer(self._failure(error, plan))
        )

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
            self._collector.rest()
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
            executor = self._executor = self._make()
            self._launcher = executor if isinstance(executor, LaunchingExecutor) else None
        self._collector.rest()
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
