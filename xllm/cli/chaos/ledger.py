"""What became of every request: opened, tokens, and exactly one end. Pure; times are given to it.

Each stream is compared with the expected one as soon as it ends, and forgotten but for its times.
Invariant: every opened request is in exactly one of `open` and the ended ones.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from xllm.cli.chaos.comparing import EQUAL, Differences, Item, compare
from xllm.errors import InvariantError

NOTED_S = 0.1
"""A pause between two words of a stream that is shorter is not kept."""


@dataclasses.dataclass(frozen=True)
class Pause:
    """The time between two words of a stream. `moved`: the second one came from another attempt
    or another connection. `redraw`: seconds that drawing what was there took, where it had to be
    drawn again."""

    start: float
    end: float
    moved: bool = False
    redraw: float = 0.0

    @property
    def length(self) -> float:
        """Seconds."""
        return self.end - self.start

    @property
    def waste(self) -> float:
        """Seconds that it took beyond drawing again."""
        return max(0.0, self.length - self.redraw)


@dataclasses.dataclass
class StreamRecord:
    """One request. `expected` and `got` by choice; both empty once it has ended."""

    key: int
    over: str
    opened_at: float
    expected: tuple[Sequence[Item], ...]
    got: list[list[Item]]
    heard_at: float = 0.0
    """When its last word came; 0: none yet."""
    first_at: float = 0.0
    """When its first word came."""
    attempt: int = 0
    pauses: list[Pause] = dataclasses.field(default_factory=list)
    ended_at: float = 0.0
    code: str = ""
    """Of the error that ended it."""
    num_ends: int = 0

    @property
    def num_left(self) -> int:
        """Items still to come."""
        return sum(map(len, self.expected)) - sum(map(len, self.got))

    def longest_pause(self, since: float, until: float) -> Pause | None:
        """The one of most waste that touches this time; that of a stream that is open runs on."""
        found = [one for one in self.pauses if one.end > since and one.start < until]
        if not self.ended_at and self.heard_at and until - self.heard_at > NOTED_S:
            found.append(Pause(self.heard_at, until))
        return max(found, key=lambda pause: pause.waste, default=None)

    def redraw(self, seconds: float) -> float:
        """How many of these seconds drawing again takes what it has: no more than the time in which
        that came."""
        came = self.heard_at - self.first_at - sum(one.length for one in self.pauses)
        return min(came, seconds)


class Ledger:
    """All requests of a run."""

    def __init__(self) -> None:
        self.open: dict[int, StreamRecord] = {}
        self.ended: list[StreamRecord] = []
        self.differences = EQUAL
        self.differing: list[str] = []
        """The requests whose streams were not what they should have been, in words."""
        self.num_after_end = 0
        """Words of requests that had ended."""
        self._last_key = 0

    @property
    def num_requests(self) -> int:
        """Requests so far."""
        return self._last_key

    @property
    def failures(self) -> Counter[str]:
        """Failed requests by code."""
        return Counter(one.code for one in self.ended if one.code)

    @property
    def num_interrupted(self) -> int:
        """Requests that went on elsewhere in the middle of their stream."""
        records = (*self.ended, *self.open.values())
        return sum(any(pause.moved for pause in one.pauses) for one in records)

    def opened(self, over: str, expected: tuple[Sequence[Item], ...], now: float) -> int:
        """A request begins; returns its key."""
        self._last_key += 1
        got: list[list[Item]] = [[] for _ in expected]
        self.open[self._last_key] = StreamRecord(self._last_key, over, now, expected, got)
        return self._last_key

    def heard(
        self,
        key: int,
        choice: int,
        items: Iterable[Item],
        now: float,
        attempt: int = 0,
        drawn_from: float | None = None,
    ) -> None:
        """New items of one choice. `attempt`: whatever tells a new source from the one before.
        `drawn_from`: since when a new source drew what had come before again; None: it had it (over
        ZeroMQ a request brings its tokens along, over HTTP an instance may still have them)."""
        record = self.open.get(key)
        if record is None:
            self.num_after_end += 1
            return
        if record.heard_at:
            moved = attempt != record.attempt
            if moved or now - record.heard_at > NOTED_S:
                redraw = 0.0
                if moved and drawn_from is not None:
                    redraw = record.redraw(now - drawn_from)
                record.pauses.append(Pause(record.heard_at, now, moved, redraw))
        else:
            record.first_at = now
        record.attempt = attempt
        record.heard_at = now
        record.got[choice].extend(items)

    def finished(self, key: int, now: float) -> None:
        """The end of a request as it was asked."""
        self._end(key, now, "")

    def failed(self, key: int, code: str, now: float) -> None:
        """The end of a request with an error."""
        self._end(key, now, code or "unknown")

    def streaming(self, min_left: int = 1) -> list[StreamRecord]:
        """Open requests in the middle of their streams: tokens came, and `min_left` will."""
        return [one for one in self.open.values() if one.heard_at and one.num_left >= min_left]

    def touching(self, since: float, until: float) -> list[StreamRecord]:
        """Requests that were open at some time of these."""
        found = [one for one in self.open.values() if one.opened_at < until]
        return found + [one for one in self.ended if one.opened_at < until and one.ended_at > since]

    def check(self) -> None:
        """InvariantError if a request is in two places, or in none."""
        if len(self.open) + len(self.ended) != self._last_key:
            raise InvariantError(f"{len(self.open)} open, {len(self.ended)} ended, "
                                 f"{self._last_key} requests")  # fmt: skip

    def _end(self, key: int, now: float, code: str) -> None:
        record = self.open.pop(key, None)
        if record is None:
            self.num_after_end += 1
            return
        record.ended_at = now
        record.code = code
        record.num_ends += 1
        found: Differences = EQUAL
        for expected, got in zip(record.expected, record.got, strict=True):
            found += compare(expected, got, ended=not code)
        if found:
            self.differences += found
            self.differing.append(_describe(record))
        record.expected = ()
        record.got = []
        self.ended.append(record)


def _describe(record: StreamRecord) -> str:
    """Where each choice's stream first differs, and how it goes on there."""
    words = [f"request {record.key} over {record.over}, ended with {record.code or 'success'}"]
    for choice, (expected, got) in enumerate(zip(record.expected, record.got, strict=True)):
        at = next(
            (at for at, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(got)),
        )
        if at < max(len(expected), len(got)):
            words.append(
                f"choice {choice} at {at} of {len(expected)}: {list(expected[at : at + 5])} is "
                f"{got[at : at + 5]}"
            )
    return "; ".join(words)
