"""The client's side of a conversation: which requests are open, until when, and what they got.

Decides who hears a message, which words are late or double, and when a request's time is over.
Does not know sockets, clocks (`now` is monotonic seconds) or threads: what must be sent is
returned. Each opened request hears `on_delta` any number of times, then exactly one of `on_end`
and `on_error`, and then nothing.

When a router is lost, the open requests and the tokens they received are all that another one
needs to go on with them (`ResumePoint`): `lost` says so, `due` gives the words for the next one.
What a router refuses for want of an instance is asked of the next one as new (`is_turned_away`).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque

from xllm.client.open_request import Listener, OpenRequest
from xllm.client.refusals import Refusals, is_worth_another
from xllm.client.retries import MAX_LOSSES, RetryBudget, is_paced
from xllm.errors import (
    BadMessageError,
    BrokenError,
    ConflictError,
    DeadlineError,
    InvariantError,
    OverloadedError,
    RequestAbortedError,
    XllmError,
    error_from_code,
)
from xllm.protocol.client import BadMessage, ClientMessage, RouterMessage
from xllm.protocol.generation import AbortRequest, RequestFailed, SubmitRequest, TokenDelta
from xllm.protocol.questions import Pong

_SPARE_TIMERS = 64


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
    num_resumed: int = 0
    """Requests that were asked for again at another router."""


class ClientSession:
    """The open requests of one client, by its own numbers."""

    def __init__(self, now: float = 0.0) -> None:
        self._budget = RetryBudget(now)
        self._unsent: deque[int] = deque()
        self._paced: deque[int] = deque()
        """Of those that wait for a router: the ones that wait for the budget, too."""
        self._refusals = Refusals()
        self._withheld: list[int] = []
        """Of those that wait for a router: the ones of models that the present one just refused."""
        self.num_routers = 1
        """Routers that are known: who knows one only need not ask another."""
        self._num_resumed = 0
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

    def must_wait(self, message: ClientMessage) -> bool:
        """Whether a new request is not for the present router now: others wait before it, or one
        of its model was just refused there."""
        return bool(self._unsent) or self._refusals.holds(message)

    def open(
        self, message: ClientMessage, listener: Listener, now: float, timeout_s: float
    ) -> OpenRequest:
        """From now on `listener` hears what comes for this message's number, for `timeout_s` at
        most. It waits for `due`, unless its sender marks it as sent."""
        request_id = message.id
        if request_id in self._open:
            raise ConflictError(f"request {request_id} is open already", param="id")
        deadline = now + timeout_s
        entry = self._open[request_id] = OpenRequest(message, listener, deadline, timeout_s)
        self._num_opened += 1
        self._budget.opened()
        heapq.heappush(self._timers, (deadline, request_id))
        if len(self._timers) > 2 * len(self._open) + _SPARE_TIMERS:
            self._timers = [(one.deadline, key) for key, one in self._open.items()]
            heapq.heapify(self._timers)
        return entry

    def waits(self, request_id: int) -> None:
        """No router could be asked yet: `due` will give it."""
        entry = self._open.get(request_id)
        if entry is None:
            return
        if self._refusals.holds(entry.message):
            self._withheld.append(request_id)
            return
        paced = is_paced(entry.num_losses + entry.num_refusals)
        (self._paced if paced else self._unsent).append(request_id)

    # -- routers that come and go --------------------------------------------------------------

    def lost(self, why: str) -> None:
        """The router is gone, stops or says nothing: all that is open is for the next one."""
        self._unsent.clear()
        self._paced.clear()
        self._withheld.clear()
        self._refusals.clear()
        for request_id, entry in list(self._open.items()):
            entry.lost()
            if entry.aborted:
                self._fail(request_id, RequestAbortedError("aborted by its client"))
            elif entry.num_losses > MAX_LOSSES:
                self._fail(request_id, BrokenError(f"{why}; {MAX_LOSSES} others before it"))
            else:
                self.waits(request_id)

    def due(self, now: float) -> tuple[OpenRequest, ClientMessage] | None:
        """The next request to ask the present router for, and the words; None: nothing now.
        The caller marks it as sent, or puts it back by `waits`."""
        entry = self._first(self._unsent)
        if entry is None:
            entry = self._first(self._paced)
            if entry is None or not self._budget.take(now):
                return None
            self._paced.popleft()
        else:
            self._unsent.popleft()
        self._num_resumed += entry.num_losses > 0
        return entry, entry.words(now)

    def is_turned_away(self, now: float) -> bool:
        """Call often. Whether the present router refused all that was asked of it, for want of an
        instance, and the next one may have one: `lost`, then. Where it has other requests of this
        client, those that it refused end as it said."""
        if not self._refusals:
            return False
        if not any(entry.is_sent for entry in self._open.values()):
            return True
        told = self._refusals.judged(now)
        for request_id, error in told.items():
            self._fail(request_id, error)
        if told:
            self._release()
        return False

    def _first(self, waiting: deque[int]) -> OpenRequest | None:
        """The first of these that is still open and not withheld; those before it are dropped, or
        wait until their model is asked for again."""
        while waiting:
            entry = self._open.get(waiting[0])
            if entry is not None and not self._refusals.holds(entry.message):
                return entry
            if entry is not None:
                self._withheld.append(waiting[0])
            waiting.popleft()
        return None

    def _release(self) -> None:
        """Models may be asked for again that were not."""
        withheld, self._withheld = self._withheld, []
        for request_id in withheld:
            self.waits(request_id)

    def _drop_refusal(self, request_id: int) -> None:
        if self._refusals.drop(request_id):
            self._release()

    # -- ends ----------------------------------------------------------------------------------

    def abort(self, request_id: int) -> AbortRequest | None:
        """Its asker wants it stopped, and to hear its end. Returns what to tell the router."""
        entry = self._open.get(request_id)
        if entry is None:
            return None
        entry.aborted = True
        if entry.is_sent:
            return AbortRequest(id=request_id)
        self._fail(request_id, RequestAbortedError("aborted by its client"))
        return None

    def forget(self, request_id: int) -> AbortRequest | None:
        """The asker lost interest: it hears nothing more. Returns what to tell the router."""
        entry = self._open.pop(request_id, None)
        if entry is None:
            return None
        self._drop_refusal(request_id)
        self._num_failed += 1
        return AbortRequest(id=request_id) if entry.is_sent else None

    def receive(self, message: RouterMessage) -> AbortRequest | None:
        """One message from the router. Returns an abort where its stream lost tokens."""
        if type(message) is TokenDelta:
            return self._receive_delta(message)
        if isinstance(message, BadMessage):
            self._refuse_unheard(message.message)
            return None
        if isinstance(message, RequestFailed) and self._is_refusal(message):
            return None
        entry = self._open.pop(message.id, None)
        self._drop_refusal(message.id)
        if entry is None:
            if not isinstance(message, Pong):
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
            asked = entry.is_sent or entry.num_losses or entry.num_refusals
            missed = "no end" if asked else "no router answered"
            self._fail(request_id, DeadlineError(f"{missed} within {entry.timeout_s:g} s"))
            if entry.is_sent:
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
            num_resumed=self._num_resumed,
        )

    def check(self) -> None:
        """InvariantError where the counts or timers do not fit the open requests."""
        if self._num_opened != self._num_ended + self._num_failed + len(self._open):
            raise InvariantError(f"requests lost: {self.statistics()}")
        refused = [key for key, entry in self._open.items() if key in self._refusals]
        if len(refused) != len(self._refusals) or any(self._open[key].is_sent for key in refused):
            raise InvariantError(f"{len(self._refusals)} refused, of which {refused} are open")
        timed = {request_id for _, request_id in self._timers}
        if not set(self._open) <= timed:
            raise InvariantError(f"requests without a timer: {sorted(set(self._open) - timed)}")

    def _is_refusal(self, message: RequestFailed) -> bool:
        """Whether a failure is one after which another router is asked; it is remembered then."""
        entry = self._open.get(message.id)
        if entry is None or not entry.is_untouched:
            return False
        asked = entry.message
        if not is_worth_another(asked, message, entry.num_refusals, self.num_routers):
            return False
        assert isinstance(asked, SubmitRequest)
        entry.refused()
        self._refusals.add(message.id, asked.model, _failure(message))
        return True

    def _receive_delta(self, delta: TokenDelta) -> AbortRequest | None:
        entry = self._open.get(delta.id)
        if entry is None:
            self._num_late += 1
            return None
        hole = entry.take(delta)
        if hole < 0:
            self._num_late += 1
            return None
        if hole:
            first = delta.first_index
            lost = f"tokens {first - hole} to {first} of choice {delta.choice} never came"
            self._fail(delta.id, BadMessageError(lost))
            return AbortRequest(id=delta.id)
        self._num_deltas += 1
        entry.listener.on_delta(delta)
        return None

    def _refuse_unheard(self, text: str) -> None:
        """The router did not understand some request: one of those it said nothing about."""
        for request_id, entry in list(self._open.items()):
            if entry.is_sent and not entry.heard:
                self._fail(request_id, BadMessageError(f"the router did not understand: {text}"))

    def _fail(self, request_id: int, error: XllmError) -> None:
        entry = self._open.pop(request_id)
        self._drop_refusal(request_id)
        self._num_failed += 1
        entry.listener.on_error(error)


def _failure(message: RequestFailed) -> XllmError:
    error = error_from_code(message.code, message.message, message.param)
    if isinstance(error, OverloadedError):
        error.retry_after_s = message.retry_after_ms / 1000 or error.retry_after_s
    return error
