"""Steps of a model at its worker: plans when it is its turn, results settled in order.

A shell around the scheduler of one worker's life; `plan_pump` says when it is asked for plans. How
many of them are under way is the scheduler's business. Invariant: results are taken in the order of
their plans.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import structlog

from xllm.errors import BadMessageError, EngineError, InvariantError
from xllm.master.metrics import MasterMetrics
from xllm.master.outcome import StepOutcome
from xllm.master.scheduler import Scheduler
from xllm.protocol.step import StepPlan, StepResult
from xllm.protocol.transport.context import describe_error

_log = structlog.get_logger("steps")
P = ParamSpec("P")
T = TypeVar("T")


class Turns(Protocol):
    """What a loop needs of the pump; see `plan_pump`."""

    def pump(self) -> None:
        """Plan soon."""

    def done(self, model: str, seconds: float) -> None:
        """A plan came back."""

    def forget(self, model: str) -> None:
        """No plan will."""


class StepLoop:
    """`turns` decides when the loop of `model` plans; `route(outcome)` reaches the routers;
    `failed` hears of exceptions that nobody else could catch."""

    def __init__(
        self,
        model: str,
        turns: Turns,
        route: Callable[[StepOutcome], None],
        failed: Callable[[Exception], None],
        metrics: MasterMetrics,
    ) -> None:
        self.scheduler: Scheduler | None = None
        self._model = model
        self._turns = turns
        self._route = route
        self._failed = failed
        self._metrics = metrics
        self._in_flight: deque[int] = deque()  # numbers of plans sent, oldest first
        self._outcome = StepOutcome()
        self._drained: asyncio.Event | None = None

    @property
    def num_open(self) -> int:
        """Open requests."""
        return self.scheduler.num_requests if self.scheduler is not None else 0

    def begin(self, scheduler: Scheduler) -> None:
        """A worker is ready that knows no sequence."""
        self.scheduler = scheduler
        self._forget_steps()
        self.pump()

    @property
    def num_in_steps(self) -> int:
        """Requests in the plans under way."""
        return self.scheduler.num_in_steps if self.scheduler is not None else 0

    @property
    def is_lone(self) -> bool:
        """Whether the plan under way is one that a request shares with nobody, on purpose."""
        return self.scheduler is not None and self.scheduler.is_lone

    @property
    def is_apart(self) -> bool:
        """Whether no other model may plan: a step that a request shares with nobody is under way,
        or is to be the next."""
        return self.scheduler is not None and self.scheduler.is_apart

    def fail_all(
        self,
        code: str,
        message: str,
        in_step: str = "",
        *,
        blameless: bool = False,
        shared: bool = False,
    ) -> None:
        """End every request with this code, now; those of a step in flight with `in_step`, which
        are as `blameless` as said, and the step as `shared`."""
        if self.scheduler is not None:
            self._forget_steps()
            outcome = self.call(self.scheduler.fail_all, code, message, in_step)
            outcome.mark(in_step, blameless=blameless, shared=shared)
            self._take(outcome)
            self.flush()

    def abandon(self) -> None:
        """The scheduler's state cannot be trusted any more: nothing of it is used again."""
        self.scheduler = None
        self._forget_steps()
        self._outcome = StepOutcome()

    def call(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the scheduler. An exception that it does not announce has left its
        state half changed: it becomes an InvariantError, which ends the process."""
        try:
            return method(*args, **kwargs)
        except (BadMessageError, InvariantError):
            raise
        except Exception as error:
            text = f"the scheduler broke: {describe_error(error)}"
            raise InvariantError(text) from error

    def pump(self) -> None:
        """Plan the next step soon, after what else is there was read."""
        self._turns.pump()

    def expire(self, now: float) -> None:
        """End what has waited too long; the pump's, as `plan` is."""
        if self.scheduler is not None:
            self._take(self.call(self.scheduler.expire, now))

    def plan(self, now: float, is_clear: bool) -> StepPlan | None:
        """The next plan, which is sent at once; None where there is none. `is_clear`: none of
        another model is under way."""
        if self.scheduler is None:
            return None
        plan = self.call(self.scheduler.schedule, now, is_clear)
        if plan is not None:
            self._in_flight.append(plan.step)
            self._metrics.num_steps += 1
        return plan

    def settle(self, result: StepResult, frames: Sequence[bytes]) -> None:
        """A step came back; results of other steps than the oldest in flight are dropped."""
        scheduler = self.scheduler
        if scheduler is None or not self._is_next(result.step):
            return
        self._in_flight.popleft()
        self._turns.done(self._model, result.duration_ns / 1e9)
        try:
            outcome = self.call(scheduler.update, result, frames, time.monotonic())
        except BadMessageError as error:
            _log.error("result_refused", step=result.step, error=error.message)
            self._fail(scheduler, result.step, EngineError.code, error.message)
        except InvariantError as error:
            self._failed(error)
        else:
            self._take(outcome)
            self.pump()

    def fail_step(self, step: int, code: str, message: str) -> None:
        """The oldest step in flight failed: its requests end; others go on."""
        if self.scheduler is None or not self._is_next(step):
            return
        self._in_flight.popleft()
        self._turns.done(self._model, 0.0)
        self._fail(self.scheduler, step, code, message)

    def flush(self) -> None:
        """Route what was collected."""
        outcome = self._outcome
        if outcome:
            self._outcome = StepOutcome()
            self._metrics.note_outcome(outcome)
            self._route(outcome)
        if self._drained is not None and not self.num_open:
            self._drained.set()

    async def wait_drained(self, timeout_s: float) -> bool:
        """Wait until nothing is open; False if something still is after `timeout_s`."""
        if self.num_open:
            self._drained = asyncio.Event()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                return False
            finally:
                self._drained = None
        return True

    def _is_next(self, step: int) -> bool:
        """Whether this step's result is the one to come. A worker answers plans in order: what
        else comes belongs to an earlier life."""
        return bool(self._in_flight) and self._in_flight[0] == step

    def _fail(self, scheduler: Scheduler, step: int, code: str, message: str) -> None:
        try:
            self._take(self.call(scheduler.fail_step, step, code, message))
        except InvariantError as error:
            self._failed(error)
        else:
            self.pump()

    def _forget_steps(self) -> None:
        self._in_flight.clear()
        self._turns.forget(self._model)

    def _take(self, outcome: StepOutcome) -> None:
        """Keep an outcome for the next flush."""
        if not outcome:
            return
        if not self._outcome:
            self._outcome = outcome
            return
        self._outcome.extend(outcome)
