"""Which requests' held tokens are due when: one timer for all of them.

Pure: the time is given. Times are rounded down to ticks, so that requests that are due almost
together cost one wake-up, and none is late by it.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class FlushWheel(Generic[T]):
    """Things by the tick at which they are due."""

    def __init__(self, tick_s: float = 0.002) -> None:
        self._tick_s = tick_s
        self._buckets: dict[int, list[T]] = {}
        self._ticks: list[int] = []

    def add(self, thing: T, due: float) -> None:
        """`thing` is due at that time (monotonic seconds)."""
        tick = int(due / self._tick_s)
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = [thing]
            heapq.heappush(self._ticks, tick)
        else:
            bucket.append(thing)

    def next_due(self) -> float | None:
        """When `pop_due` will next have something."""
        return self._ticks[0] * self._tick_s if self._ticks else None

    def pop_due(self, now: float) -> list[T]:
        """All that is due, in the order of its ticks."""
        due: list[T] = []
        # The sum guards against a tick whose time rounds to just after `now`.
        limit = int(now / self._tick_s + 1e-6)
        while self._ticks and self._ticks[0] <= limit:
            due += self._buckets.pop(heapq.heappop(self._ticks))
        return due
