"""Whether instances hear this router: decides from when they were asked, and when they answered.

Pure: the time is monotonic seconds. A connection can carry words one way only; then an instance
beats on its bus, says tokens, and never hears of what it is sent. Each is asked over the connection
that requests take. Invariant: an incarnation that has not answered once is not judged: it may be of
a version that does not know the question.
"""

from __future__ import annotations

import dataclasses

MISSED_ANSWERS = 3
"""Periods after which an unanswered question makes an instance deaf: as many as heartbeats."""
MIN_PATIENCE_S = 0.5
"""But not sooner than this."""
RECONNECT_S = 5.0
"""A connection over which nothing was answered for so long is worth no more patience."""


@dataclasses.dataclass(slots=True)
class _Ear:
    """One connection."""

    answers: bool
    """Whether this incarnation ever did."""
    asked_at: float | None = None
    """When the oldest question without an answer was asked."""
    is_deaf: bool = False

    def owes(self, seconds: float, now: float) -> bool:
        """Whether an answer has been due for so long."""
        return self.answers and self.asked_at is not None and now - self.asked_at > seconds


class Hearing:
    """All instances that this router is connected to, each asked once in `period_s`."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._patience_s = max(MISSED_ANSWERS * period_s, MIN_PATIENCE_S)
        self._ears: dict[str, _Ear] = {}
        self._answering: set[str] = set()
        """Instances that ever answered, over this connection or one before it."""
        self._ticked_at: float | None = None

    @property
    def to_ask(self) -> tuple[str, ...]:
        """Instances to ask now: those that answer questions, deaf or not."""
        return tuple(name for name, one in self._ears.items() if one.answers)

    def connected(self, name: str) -> None:
        """A new connection stands, over which it is to be asked at once."""
        self._ears[name] = _Ear(name in self._answering)

    def gone(self, name: str) -> None:
        """There is no connection any more. Unknown names are ignored."""
        self._ears.pop(name, None)

    def forget(self, name: str) -> None:
        """Another incarnation, or none, has that name from now on."""
        self.gone(name)
        self._answering.discard(name)

    def asked(self, name: str, now: float) -> None:
        """A question was sent."""
        one = self._ears.get(name)
        if one is not None and one.asked_at is None:
            one.asked_at = now

    def answered(self, name: str) -> bool:
        """An answer came; whether the instance had been deaf until then."""
        one = self._ears.get(name)
        if one is None:
            return False
        was_deaf = one.is_deaf
        one.answers, one.asked_at, one.is_deaf = True, None, False
        self._answering.add(name)
        return was_deaf

    def tick(self, now: float) -> tuple[str, ...]:
        """Call at least once a period: who is deaf from now on. After a pause of this process
        nobody is: the answers may still wait unread."""
        paused = self._ticked_at is not None and now - self._ticked_at > self._period_s * 2
        self._ticked_at = now
        found = []
        for name, one in self._ears.items():
            if paused:
                one.asked_at = None
            elif not one.is_deaf and one.owes(self._patience_s, now):
                one.is_deaf = True
                found.append(name)
        return tuple(found)

    def hopeless(self, now: float) -> tuple[str, ...]:
        """After `tick`: whose connection is to be made anew."""
        return tuple(name for name, one in self._ears.items() if one.owes(RECONNECT_S, now))
