"""The router's admission: limits of tenants at the door, and the line of those who wait.

A shell around `tenants` and `waiting_line`: it knows the clock and who carries their decisions
out. Requests enter through it (`arrive`, `spend`, `enter`) and leave by `left`. Whoever waits has
no state in the table of open requests, like one whose text is still encoded, so that a deadline, an
abort or a shutdown ends it as one of those. Invariant: the lines hold open requests only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from xllm.config.admission import AdmissionSettings
from xllm.errors import InvalidRequestError, OverloadedError, UnavailableError
from xllm.protocol.bus import RouterPresence, TenantUse
from xllm.protocol.generation import RequestFailed, RequestFinished
from xllm.router.admission.figures import AdmissionFigures
from xllm.router.admission.limits_file import make_gate
from xllm.router.admission.model_line import ModelLine
from xllm.router.admission.waiting_line import Rank, Waiter, WaitingLine
from xllm.router.inflight import InflightRequest
from xllm.router.state.instructions import Instruction, Wish
from xllm.router.state.request import RequestLife

Start = Callable[[InflightRequest, RequestLife, Sequence[Instruction]], None]
Fail = Callable[[str, InflightRequest, RequestFailed], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A request in a line."""

    request: InflightRequest
    state: RequestLife
    instructions: Sequence[Instruction]


class AdmissionControl:
    """Of one router. `has_room(model, offline)` says whether an instance may get one more (None:
    none is usable), `expects(model, now, grace_s)` whether one may soon; `start` lets a request go
    to one, `fail` ends one that is not to be had."""

    def __init__(
        self,
        settings: AdmissionSettings,
        has_room: Callable[[str, bool], bool | None],
        expects: Callable[[str, float, float], bool],
        start: Start,
        fail: Fail,
        clock: Callable[[], float],
        figures: AdmissionFigures | None = None,
    ) -> None:
        self._settings = settings
        self._has_room = has_room
        self._expects = expects
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
            resumed = request.life > 1
            request.counted = self._gate.enter(account, self._clock(), resumed=resumed)
        except OverloadedError as error:
            self.figures.reject("limit", account)
            raise error

    @contextlib.contextmanager
    def question(self, account: str) -> Iterator[None]:
        """Around work on texts or ids that is no part of a request: it counts as one against the
        tenant's requests, and while it is open. RateLimitError: not now."""
        try:
            counted = self._gate.enter(account, self._clock())
        except OverloadedError as error:
            self.figures.reject("limit", account)
            raise error
        try:
            yield
        finally:
            if counted:
                # It says nothing of how long requests take.
                self._gate.leave(account, 0, self._gate.mean_s, self._clock())

    def foresee(self, request: InflightRequest, model: str, tenant: str, rank: Rank) -> None:
        """OverloadedError for a request that would be sent away once its prompt is known: it is
        told before the work on that."""
        one = self._line(model)
        if request.life > 1 or not one.line.turns_away(rank, tenant):
            return
        if len(one.line) or self._has_room(model, not rank[0]) is False:
            self.figures.reject("queue", request.account)
            raise self._full_error(one, self._clock())

    def window(self, account: str, num_requests: int, most: int) -> int:
        """How many of `num_requests` that one caller asks together may be open at a time, `most`
        at most. InvalidRequestError where there are more than its tenant may ask in a minute."""
        limits = self._gate.limits(account)
        if 0 < limits.requests_per_minute < num_requests:
            raise InvalidRequestError(
                f"these are {num_requests} requests, but this tenant may ask "
                f"{limits.requests_per_minute} a minute"
            )
        return min(most, limits.concurrency or most)

    def spend(self, request: InflightRequest, num_tokens: int) -> None:
        """The length of its prompt is known. RateLimitError: it is too much now;
        InvalidRequestError: it always is."""
        if not request.counted:
            return
        try:
            self._gate.spend(request.account, num_tokens, self._clock(), resumed=request.life > 1)
        except OverloadedError as error:
            self.figures.reject("limit", request.account)
            raise error

    def enter(
        self,
        request: InflightRequest,
        state: RequestLife,
        instructions: Sequence[Instruction],
    ) -> None:
        """It is ready and its tokens are spent: start it, or have it wait. OverloadedError: it may
        not."""
        spec = state.spec
        needs_none = bool(instructions) and instructions[-1] is not Wish.PLACE
        if needs_none or request.life > 1:
            # It needs no instance, or had its turn at a router that was lost.
            self._start(request, state, instructions)
            return
        waiting = self._lines.get(spec.model)
        empty = waiting is None or not len(waiting.line)
        if empty:
            room = self._has_room(spec.model, spec.offline)
            early = room is None and self._may_come(spec.model)
            if room is not False and not early:
                self._start(request, state, instructions)
                return
            self._line(spec.model).is_early = early
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
            self._gate.leave(request.account, num_drawn(request), now - request.started, now)
            request.counted = False
        if self._held and request.state is not None:
            self._pump(request.state.spec.model)

    def tick(self) -> None:
        """About ten times a second: deadlines, and room that heartbeats told of."""
        now = self._clock()
        for model, one in self._lines.items():
            if one.is_early:
                self._look_again(model, one, now)
            for waiter in one.line.expire(now):
                held = self._held.pop(waiter.request_id)
                self.figures.waited(now - waiter.joined)
                error: OverloadedError | UnavailableError = OverloadedError(
                    "no instance had room in time", retry_after_s=one.drain_s(now)
                )
                if self._has_room(model, not waiter.online) is None:
                    error = UnavailableError("no instance was ready in time")
                self._reject(waiter.request_id, held.request, error, "timeout")
            if len(one.line):
                self._pump(model)
            one.count(now)
        self._gate.forget(now)

    def instances_ready(self) -> None:
        """Instances can take requests now that could not before."""
        for model, one in self._lines.items():
            if len(one.line):
                self._pump(model)

    # -- other routers -----------------------------------------------------------------------

    def word(self) -> tuple[TenantUse, ...]:
        """What to tell the other routers of limited tenants, each time of what came since."""
        return self._gate.word()

    def heard(self, word: RouterPresence) -> None:
        """Another router told of its tenants."""
        self._gate.heard(word.publisher, word.tenants, self._clock())

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
        one = self._line(spec.model)
        deadline = spec.deadline
        if not spec.offline:
            patience = settings.queue_timeout_s
            if spec.ttft_ms:
                patience = min(patience, spec.ttft_ms / 1000)
            # One that ran and was lost begins to wait now.
            since = now if state.moves.num_lost else request.started
            deadline = min(deadline, since + patience)
        cost = len(spec.prompt_ids)
        waiter = Waiter(
            spec.request_id, spec.tenant, not spec.offline, spec.priority, cost, deadline, now
        )
        self._held[spec.request_id] = Held(request, state, instructions)
        last = one.line.push(waiter)
        if last is None:
            return
        held = self._held.pop(last.request_id)
        error = self._full_error(one, now)
        if held.request is request:
            self.figures.reject("queue", request.account)
            raise error
        self._reject(last.request_id, held.request, error, "shed")

    def _may_come(self, model: str) -> bool:
        """Whether it is worth waiting for an instance of a model that has none."""
        settings = self._settings
        return bool(settings.queue_size) and self._expects(
            model, self._clock(), settings.expected_instance_s
        )

    def _look_again(self, model: str, one: ModelLine, now: float) -> None:
        """The line began when no instance of its model was heard of: one was since, which settles
        how long they wait, or none will be."""
        if self._has_room(model, False) is None:
            if self._may_come(model):
                return
            error = UnavailableError("no instance is ready")
            for waiter in one.line.expire(math.inf):
                held = self._held.pop(waiter.request_id)
                self.figures.waited(now - waiter.joined)
                self._reject(waiter.request_id, held.request, error, "timeout")
        one.is_early = False

    def _full_error(self, one: ModelLine, now: float) -> OverloadedError:
        size = self._settings.queue_size
        return OverloadedError(
            f"{size} requests wait for an instance (admission.queue_size)"
            if size
            else "no instance has room",
            retry_after_s=one.drain_s(now),
        )

    def _line(self, model: str) -> ModelLine:
        one = self._lines.get(model)
        if one is None:
            line = WaitingLine(self._settings.queue_size)
            one = self._lines[model] = ModelLine(line, counted_at=self._clock())
        return one

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
            everywhere=isinstance(error, UnavailableError) and error.everywhere,
        )
        self._fail(request_id, request, failed)


def num_drawn(request: InflightRequest) -> int:
    """Tokens that were drawn for a request since it came here, however it ended."""
    if request.state is None:
        return 0
    return max(0, sum(len(one.ids) for one in request.state.choices) - request.num_held)
