"""Circuit breakers: an instance that keeps failing requests is left alone for a while. Pure.

Failures are the instance's own: an engine error, a lost worker, an internal error. What is wrong
with a request (a 4xx), a deadline, an abort and a full queue say nothing about an instance and
are ignored. One fault that hits many requests at once counts once. The breaker opens after
`failures` of them within `window_s`, if no more requests ended well than ill meanwhile; after
`open_s` one request is let through as a trial (half-open), and another one once that has a token:
an answer may take minutes. The first trial that ends well closes the breaker; one that fails opens
it again for twice as long, at most MAX_DOUBLED times `open_s`.

Breakers choose between instances and never refuse a request: where all instances of a model
are open, they are all used as if none was.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from xllm.errors import EngineError, InvariantError, WorkerLostError, XllmError
from xllm.router.process_views import InstanceView

FAILURES = frozenset((EngineError.code, WorkerLostError.code, XllmError.code, InvariantError.code))
"""Codes of an attempt's end that speak against its instance."""
TOGETHER_S = 0.2
"""Failures so close are one fault."""
MAX_DOUBLED = 8


@dataclasses.dataclass(slots=True)
class BreakerState:
    """Of one instance that failed lately."""

    failures: deque[float]
    """Times of the last faults."""
    num_ill: int = 0
    """Requests that failed since the first of them; `num_well`: that did not."""
    num_well: int = 0
    opened_until: float = 0.0
    """0: closed."""
    open_s: float = 0.0
    trial: str = ""
    """The request that was let through, and has no token yet."""
    begun: set[str] = dataclasses.field(default_factory=set)
    """Trials that have."""


class CircuitBreakers:
    """All of a router. `failures` 0: none."""

    def __init__(self, failures: int, window_s: float, open_s: float) -> None:
        self._failures = failures
        self._window_s = window_s
        self._open_s = open_s
        self._states: dict[str, BreakerState] = {}
        self.num_opened: int = 0

    def passable(self, candidates: Sequence[InstanceView], now: float) -> Sequence[InstanceView]:
        """Those of the candidates that may get a request; all of them where none may."""
        if not self._states:
            return candidates
        left = [one for one in candidates if self._passes(one.name, now)]
        return left or candidates

    def state(self, name: str, now: float) -> str:
        """closed, open or half-open."""
        one = self._states.get(name)
        if one is None or not one.opened_until:
            return "closed"
        return "open" if now < one.opened_until else "half-open"

    def sent(self, name: str, request_id: str, now: float) -> None:
        """A request was sent there."""
        one = self._states.get(name)
        if one is not None and one.opened_until and now >= one.opened_until and not one.trial:
            one.trial = request_id

    @property
    def on_trial(self) -> bool:
        """Whether a token is waited for somewhere."""
        return bool(self._states) and any(one.trial for one in self._states.values())

    def answers(self, name: str, request_id: str) -> None:
        """A token of it came from there."""
        one = self._states.get(name)
        if one is not None and one.trial == request_id:
            one.trial = ""
            one.begun.add(request_id)

    def left(self, name: str, request_id: str) -> None:
        """It runs there no more; of a trial without a verdict there will be another."""
        one = self._states.get(name)
        if one is not None:
            one.begun.discard(request_id)
            if one.trial == request_id:
                one.trial = ""

    def ended(self, name: str, request_id: str, code: str, now: float) -> None:
        """An instance ended an attempt: with an error's code, or "" for well."""
        if not code:
            self._well(name, request_id)
        elif code in FAILURES:
            self._ill(name, request_id, now)

    def died(self, name: str, now: float) -> None:
        """An instance was lost in the midst of its work."""
        self._ill(name, "", now)

    def forget(self, now: float) -> None:
        """Call now and then: drop what is long past."""
        for name, one in list(self._states.items()):
            past = now - self._window_s - 2 * one.open_s
            on_trial = one.trial or one.begun
            if not on_trial and one.opened_until < past and one.failures[-1] < past:
                del self._states[name]

    def _passes(self, name: str, now: float) -> bool:
        one = self._states.get(name)
        if one is None or not one.opened_until:
            return True
        return now >= one.opened_until and not one.trial

    def _well(self, name: str, request_id: str) -> None:
        one = self._states.get(name)
        if one is None:
            return
        one.num_well += 1
        if one.opened_until and (one.trial == request_id or request_id in one.begun):
            del self._states[name]

    def _ill(self, name: str, request_id: str, now: float) -> None:
        if not self._failures:
            return
        one = self._states.get(name)
        if one is None:
            one = self._states[name] = BreakerState(deque(maxlen=self._failures))
        if one.opened_until:
            on_trial = one.begun | {one.trial} - {""}
            if on_trial and (not request_id or request_id in on_trial):
                self._open(one, min(2 * one.open_s, MAX_DOUBLED * self._open_s), now)
            return
        times = one.failures
        if times and times[0] < now - self._window_s:
            while times and times[0] < now - self._window_s:
                times.popleft()
            if not times:
                one.num_ill = one.num_well = 0
        one.num_ill += 1
        if not times or now - times[-1] >= TOGETHER_S:
            times.append(now)
        if len(times) == self._failures and one.num_ill >= one.num_well:
            self._open(one, self._open_s, now)

    def _open(self, one: BreakerState, open_s: float, now: float) -> None:
        one.open_s = open_s
        one.opened_until = now + open_s
        one.trial = ""
        one.begun.clear()
        self.num_opened += 1
