"""The router's admission: limits of tenants at the door, and the line of those who wait.

A shell around `tenants` and `waiting_line`: it knows the clock and who carries their decisions
out. Requests enter through it (`arrive`, then `enter`) and leave by `left`. Whoever waits has no
state in the table of open requests, like one whose text is still encoded, so that a deadline, an
abort or a shutdown ends it as one of those. Invariant: the lines hold open requests only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from xllm.config.admission import AdmissionSettings
from xllm.errors import OverloadedError, UnavailableError
from xllm.protocol.client import RequestFailed, RequestFinished
from xllm.router.admission.figures import AdmissionFigures
from xllm.router.admission.limits_file import make_gate
from xllm.router.admission.tenants import MAX_RETRY_S, MIN_RETRY_S
from xllm.router.admission.waiting_line import Waiter, WaitingLine
from xllm.router.inflight import InflightRequest
from xllm.router.state.instructions import Instruction, Wish
from xllm.router.state.request import RequestLife

RATE_S = 5.0
"""The rate at which a line is served is that of about the last so many seconds."""
Start = Callable[[InflightRequest, RequestLife, Sequence[Instruction]], None]
Fail = Callable[[str, InflightRequest, RequestFailed], None]


@dataclasses.dataclass(slots=True)
class ModelLine:
    """One model's line, and how fast it is served."""

    line: WaitingLine
    rate: float = 0.0
    """Requests a second; 0: not known yet."""
    num_served: int = 0
    """Since `counted_at`."""
    counted_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A request in a line."""

    request: InflightRequest
    state: RequestLife
    instructions: Sequence[Instruction]


class AdmissionControl:
    """Of one router. `has_room(model, offline)` says whether an instance may get one more (None:
    none is usable); `start` lets a request go to one, `fail` ends one that is not to be had."""

    def __init__(
        self,
        settings: AdmissionSettings,
        has_room: Callable[[str, bool], bool | None],
        start: Start,
        fail: Fail,
        clock: Callable[[], float],
        figures: AdmissionFigures | None = None,
    ) -> None:
        self._settings = settings
        self._has_room = has_room
        self._start = start
        self._fail = fail
        self._clock = clock
        self.figures = figures or AdmissionFigures()
        self._gate = make_gate(settings)
        self._lines: dict[str, ModelLine] = {}
        self._held: dict[str, Held] = {}
        self._pumping = False

    # -- requests ----------------------------------------------------------------------------

    def arrive(self, request: InflightRequest, account: str) -> None:
        """A request comes; nothing of it was looked at yet. RateLimitError: not now."""
        request.account = account
        try:
            request.counted = self._gate.enter(account, self._clock())
        except OverloadedError as error:
            self.figures.reject("limit", account)
            raise error

    def enter(
        self,
        request: InflightRequest,
        state: RequestLife,
        instructions: Sequence[Instruction],
    ) -> None:
        """Its prompt is known: start it, or have it wait. XllmError: it may not."""
        spec = state.spec
        if request.counted:
            try:
                self._gate.spend(request.account, len(spec.prompt_ids), self._clock())
            except OverloadedError as error:
                self.figures.reject("limit", request.account)
                raise error
        if instructions and instructions[-1] is not Wish.PLACE:
            self._start(request, state, instructions)  # it needs no instance
            return
        waiting = self._lines.get(spec.model)
        empty = waiting is None or not len(waiting.line)
        if empty and self._has_room(spec.model, spec.offline) is not False:
            self._start(request, state, instructions)
            return
        self._wait(request, state, instructions)
        self._pump(spec.model)

    def take_back(self, request: InflightRequest) -> bool:
        """Every instance refused a request, for their queues are full: it waits for room, unless
        its answer has begun. False: it does not."""
        state = request.state
        assert state is not None
        if not self._settings.queue_size or state.moves.last_refusal != OverloadedError.code:
            return False
        if any(choice.ids for choice in state.choices):
            return False
        state.moves.accepted()  # ask everybody again
        request.state = None
        try:
            self._wait(request, state, (Wish.PLACE,))
        except OverloadedError as error:
            self._fail_with(state.spec.request_id, request, error)
        return True

    def left(self, request: InflightRequest, last: RequestFinished | RequestFailed) -> None:
        """A request got its terminal message: it waits no more, and perhaps made room."""
        if last.request_id in self._held:
            self._unhold(last.request_id)
        if request.counted:
            now = self._clock()
            num_new = last.usage.completion_tokens if isinstance(last, RequestFinished) else 0
            self._gate.leave(request.account, num_new, now - request.started, now)
            request.counted = False
        if self._held and request.state is not None:
            self._pump(request.state.spec.model)

    def tick(self) -> None:
        """About ten times a second: deadlines, and room that heartbeats told of."""
        now = self._clock()
        for model, one in self._lines.items():
            for waiter in one.line.expire(now):
                held = self._held.pop(waiter.request_id)
                self.figures.waited(now - waiter.joined)
                error: OverloadedError | UnavailableError = OverloadedError(
                    "no instance had room in time", retry_after_s=self._drain_s(one, now)
                )
                if self._has_room(model, not waiter.online) is None:
                    error = UnavailableError("no instance was ready in time")
                self._reject(waiter.request_id, held.request, error, "timeout")
            if len(one.line):
                self._pump(model)
            self._count(one, now)
        self._gate.forget(now)

    # -- questions ---------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._held)

    def check(self) -> None:
        """InvariantError if the lines cannot be."""
        for one in self._lines.values():
            one.line.check()

    # -- the line ----------------------------------------------------------------------------

    def _wait(
        self, request: InflightRequest, state: RequestLife, instructions: Sequence[Instruction]
    ) -> None:
        spec, settings, now = state.spec, self._settings, self._clock()
        one = self._lines.get(spec.model)
        if one is None:
            line = WaitingLine(settings.queue_size)
            one = self._lines[spec.model] = ModelLine(line, counted_at=now)
        deadline = spec.deadline
        if not spec.offline:
            patience = settings.queue_timeout_s
            if spec.ttft_ms:
                patience = min(patience, spec.ttft_ms / 1000)
            deadline = min(deadline, request.started + patience)
        cost = len(spec.prompt_ids)
        waiter = Waiter(
            spec.request_id, spec.tenant, not spec.offline, spec.priority, cost, deadline, now
        )
        self._held[spec.request_id] = Held(request, state, instructions)
        last = one.line.push(waiter)
        if last is None:
            return
        held = self._held.pop(last.request_id)
        error = OverloadedError(
            f"{settings.queue_size} requests wait for an instance (admission.queue_size)"
            if settings.queue_size
            else "no instance has room",
            retry_after_s=self._drain_s(one, now),
        )
        if held.request is request:
            self.figures.reject("queue", request.account)
            raise error
        self._reject(last.request_id, held.request, error, "shed")

    def _pump(self, model: str) -> None:
        """Let go whom there is room for."""
        if self._pumping:
            return  # a request that starts may end at once, and then come here
        one = self._lines.get(model)
        if one is None:
            return
        self._pumping = True
        try:
            while (head := one.line.head()) and self._has_room(model, not head.online):
                one.line.pop()
                held = self._held.pop(head.request_id)
                one.num_served += 1
                self.figures.waited(self._clock() - head.joined)
                self._start(held.request, held.state, held.instructions)
        finally:
            self._pumping = False

    def _unhold(self, request_id: str) -> None:
        held = self._held.pop(request_id)
        self._lines[held.state.spec.model].line.remove(request_id)

    def _reject(
        self,
        request_id: str,
        request: InflightRequest,
        error: OverloadedError | UnavailableError,
        why: str,
    ) -> None:
        self.figures.reject(why, request.account)
        self._fail_with(request_id, request, error)

    def _fail_with(
        self, request_id: str, request: InflightRequest, error: OverloadedError | UnavailableError
    ) -> None:
        retry_s = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        failed = RequestFailed(
            id=request.client_id,
            code=error.code,
            message=error.message,
            request_id=request_id,
            retry_after_ms=int(retry_s * 1000),
        )
        self._fail(request_id, request, failed)

    # -- when to come back -------------------------------------------------------------------

    def _drain_s(self, one: ModelLine, now: float) -> float:
        """How long those who wait now will take, at the present rate."""
        elapsed = now - one.counted_at
        rate = one.rate or (one.num_served / elapsed if elapsed > 0 else 0.0)
        if not rate:
            return 1.0
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (len(one.line) + 1) / rate))

    def _count(self, one: ModelLine, now: float) -> None:
        elapsed = now - one.counted_at
        if elapsed < RATE_S:
            return
        rate = one.num_served / elapsed
        one.rate = (one.rate + rate) / 2 if one.rate else rate
        one.num_served, one.counted_at = 0, now
