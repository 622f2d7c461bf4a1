"""How far the engine has come: a counter that moves with every bounded piece of work.

A piece is a layer's projections, one part of its attention, a slice of the head, of scores or of
draws. Devices that compute behind the host's back are asked through marks: work that was only
launched does not count. It knows no time. Invariant: the value never falls, and stands while
neither host nor device finishes a piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from xllm.worker.platform.platform import DeviceMark

_TICKS_A_MARK = 4
"""A mark is a call into the device's driver; a count in four is enough there."""

_MAX_MARKS = 256
"""Marks kept where nobody asks how far the device has come."""


class ProgressCounter:
    """Counts pieces of work. One thread ticks, another may read `value`: each field has one
    writer."""

    def __init__(self) -> None:
        self._launched = 0
        self._settled = 0  # written by the ticking thread
        self._reached = 0  # written by the reading thread
        self._elsewhere: Callable[[], int] = int  # pieces that others count
        self._mark: Callable[[], DeviceMark | None] | None = None  # None: launched is done
        self._pending: deque[tuple[int, DeviceMark]] = deque()

    def follow(self, mark: Callable[[], DeviceMark | None]) -> None:
        """Count what the device has done; `mark` is the platform's."""
        self._mark = mark if mark() is not None else None

    def add_counter(self, count: Callable[[], int]) -> None:
        """Count the pieces that `count` gives, too; it never falls, and any thread may call it."""
        self._elsewhere = count

    def settle_elsewhere(self) -> None:
        """Who counted elsewhere is about to go: what it counted stays."""
        self._launched += self._elsewhere()
        self.settle()
        self._elsewhere = int

    @property
    def value(self) -> int:
        """Pieces done. Any one thread beside the ticking one may read it."""
        pending = self._pending
        while pending and pending[0][1]():
            self._reached = pending.popleft()[0]
        return max(self._reached, self._settled) + self._elsewhere()

    def tick(self) -> None:
        """A piece is done, or launched on a device that says itself when it is done."""
        self._launched += 1
        if self._mark is None:
            self._settled = self._launched
        elif self._launched % _TICKS_A_MARK == 0 and len(self._pending) < _MAX_MARKS:
            mark = self._mark()
            if mark is not None:
                self._pending.append((self._launched, mark))

    def settle(self) -> None:
        """All that was launched is done: the device was waited for."""
        # A reader may still hold the old queue: what it finds there is not above this.
        self._pending = deque()
        self._settled = self._launched
