"""The client's side of a conversation: which requests are open, until when, and what they got.

Decides who hears a message, which words are late or double, and when a request's time is over.
Does not know sockets, clocks (`now` is monotonic seconds) or threads: what must be sent is
returned. Each opened request hears `on_delta` any number of times, then exactly one of `on_end`
and `on_error`, and then nothing.

Several routers: the open requests and the tokens they received are all that another router needs
to go on with them (`ResumePoint`); the shell of today fails them instead.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Protocol

from xllm.errors import (
    BadMessageError,
    ConflictError,
    DeadlineError,
    InvariantError,
    OverloadedError,
    XllmError,
    error_from_code,
)
from xllm.protocol.client import (
    AbortRequest,
    BadMessage,
    DetokenizedText,
    HealthReport,
    ModelList,
    ModelSleepSet,
    RequestFailed,
    RequestFinished,
    RouterMessage,
    StatusReport,
    TokenDelta,
    TokenizedText,
)

EndMessage = (
    RequestFinished
    | ModelList
    | HealthReport
    | StatusReport
    | TokenizedText
    | DetokenizedText
    | ModelSleepSet
)
"""What ends a request or question well."""

_SPARE_TIMERS = 64


class Listener(Protocol):
    """Who asked. Called on the client's loop; must not block and must not raise."""

    def on_delta(self, delta: TokenDelta) -> None:
        """New tokens of one choice, each token once and in order."""

    def on_end(self, message: EndMessage) -> None:
        """The answer is complete."""

    def on_error(self, error: XllmError) -> None:
        """There will be no (further) answer, and why."""


class OpenRequest:
    """One request that has not ended: its listener and the tokens received by choice."""

    __slots__ = ("deadline", "heard", "listener", "num_received", "timeout_s")

    def __init__(self, listener: Listener, deadline: float, timeout_s: float) -> None:
        self.listener = listener
        self.deadline = deadline
        self.timeout_s = timeout_s
        self.num_received: dict[int, int] = {}
        self.heard = False


@dataclasses.dataclass(frozen=True)
class ClientStatistics:
    """Counts since the start of a session, and what is open now."""

    num_open: int
    num_opened: int
    num_ended: int
    num_failed: int
    num_deltas: int
    num_late: int
    """Messages for requests that had ended here, and repeated tokens: dropped."""


class ClientSession:
    """The open requests of one connection, by the client's own numbers."""

    def __init__(self) -> None:
        self._open: dict[int, OpenRequest] = {}
        self._timers: list[tuple[float, int]] = []
        self._last_id = 0
        self._num_opened = 0
        self._num_ended = 0
        self._num_failed = 0
        self._num_deltas = 0
        self._num_late = 0

    @property
    def num_open(self) -> int:
        """Requests that wait for their end."""
        return len(self._open)

    def next_id(self) -> int:
        """A number never used before in this session."""
        self._last_id += 1
        return self._last_id

    def is_open(self, request_id: int) -> bool:
        """Whether a request still waits for its end."""
        return request_id in self._open

    def open(self, request_id: int, listener: Listener, now: float, timeout_s: float) -> None:
        """From now on `listener` hears what comes for this number, for `timeout_s` at most."""
        if request_id in self._open:
            raise ConflictError(f"request {request_id} is open already", param="id")
        deadline = now + timeout_s
        self._open[request_id] = OpenRequest(listener, deadline, timeout_s)
        self._num_opened += 1
        heapq.heappush(self._timers, (deadline, request_id))
        if len(self._timers) > 2 * len(self._open) + _SPARE_TIMERS:
            self._timers = [(one.deadline, key) for key, one in self._open.items()]
            heapq.heapify(self._timers)

    def forget(self, request_id: int) -> AbortRequest | None:
        """The asker lost interest: it hears nothing more. Returns what to tell the router."""
        if self._open.pop(request_id, None) is None:
            return None
        self._num_failed += 1
        return AbortRequest(id=request_id)

    def receive(self, message: RouterMessage) -> AbortRequest | None:
        """One message from the router. Returns an abort where its stream lost tokens."""
        if type(message) is TokenDelta:
            return self._receive_delta(message)
        if isinstance(message, BadMessage):
            self._refuse_unheard(message.message)
            return None
        entry = self._open.pop(message.id, None)
        if entry is None:
            self._num_late += 1
        elif isinstance(message, RequestFailed):
            self._num_failed += 1
            entry.listener.on_error(_failure(message))
        else:
            assert not isinstance(message, TokenDelta)
            self._num_ended += 1
            entry.listener.on_end(message)
        return None

    def expire(self, now: float) -> list[AbortRequest]:
        """End the requests whose time is over; returns what to tell the router."""
        aborts: list[AbortRequest] = []
        while self._timers and self._timers[0][0] <= now:
            _, request_id = heapq.heappop(self._timers)
            entry = self._open.get(request_id)
            if entry is None or entry.deadline > now:
                continue
            self._fail(request_id, DeadlineError(f"no end within {entry.timeout_s:g} s"))
            aborts.append(AbortRequest(id=request_id))
        return aborts

    def fail_all(self, error: XllmError) -> None:
        """The connection is gone or was closed: every open request ends with this error."""
        for request_id in list(self._open):
            self._fail(request_id, type(error)(error.message))

    def fail(self, request_id: int, error: XllmError) -> None:
        """One open request ends with this error; unknown numbers are ignored."""
        if request_id in self._open:
            self._fail(request_id, error)

    def statistics(self) -> ClientStatistics:
        """A snapshot of the counts."""
        return ClientStatistics(
            num_open=len(self._open),
            num_opened=self._num_opened,
            num_ended=self._num_ended,
            num_failed=self._num_failed,
            num_deltas=self._num_deltas,
            num_late=self._num_late,
        )

    def check(self) -> None:
        """InvariantError where the counts or timers do not fit the open requests."""
        if self._num_opened != self._num_ended + self._num_failed + len(self._open):
            raise InvariantError(f"requests lost: {self.statistics()}")
        timed = {request_id for _, request_id in self._timers}
        if not set(self._open) <= timed:
            raise InvariantError(f"requests without a timer: {sorted(set(self._open) - timed)}")

    def _receive_delta(self, delta: TokenDelta) -> AbortRequest | None:
        entry = self._open.get(delta.id)
        if entry is None:
            self._num_late += 1
            return None
        entry.heard = True
        have = entry.num_received.get(delta.choice, 0)
        if delta.token_ids and delta.first_index != have:
            if delta.first_index < have:
                self._num_late += 1
                return None
            lost = f"tokens {have} to {delta.first_index} of choice {delta.choice} never came"
            self._fail(delta.id, BadMessageError(lost))
            return AbortRequest(id=delta.id)
        entry.num_received[delta.choice] = have + len(delta.token_ids)
        self._num_deltas += 1
        entry.listener.on_delta(delta)
        return None

    def _refuse_unheard(self, text: str) -> None:
        """The router did not understand some request: one of those it said nothing about."""
        for request_id, entry in list(self._open.items()):
            if not entry.heard:
                self._fail(request_id, BadMessageError(f"the router did not understand: {text}"))

    def _fail(self, request_id: int, error: XllmError) -> None:
        entry = self._open.pop(request_id)
        self._num_failed += 1
        entry.listener.on_error(error)


def _failure(message: RequestFailed) -> XllmError:
    error = error_from_code(message.code, message.message, message.param)
    if isinstance(error, OverloadedError):
        error.retry_after_s = message.retry_after_ms / 1000 or error.retry_after_s
    return error
