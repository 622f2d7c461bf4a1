"""When the owner of workers is told of a loss, and what it is told.

A connection ends a moment before its process, and only the end of that says whether somebody ended
it: until then the owner is not told, but never for longer than VERDICT_S. Invariant: each loss that
is noted is told once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

VERDICT_S = 0.1
"""A process that outlives its connection for so long is taken for the reason."""


class WorkerLosses:
    """`tell(reason, by_itself)`: see WorkerOwner.worker_lost; `later`: see Actor."""

    def __init__(
        self, tell: Callable[[str, bool], None], later: Callable[..., asyncio.TimerHandle]
    ) -> None:
        self._tell = tell
        self._later = later
        self._waiting: tuple[int, str] | None = None
        """Rank whose process will say, and the reason so far."""
        self._timer: asyncio.TimerHandle | None = None

    def lost(self, reason: str, *, by_itself: bool) -> None:
        """Tell of a loss whose cause is known."""
        self.settle()
        self._tell(reason, by_itself)

    def lost_connection(self, rank: int, reason: str) -> None:
        """Tell of a loss once the end of that rank's process says more."""
        self.settle()
        self._waiting = (rank, reason)
        self._timer = self._later(VERDICT_S, self.settle)

    def process_ended(self, rank: int, reason: str, *, by_itself: bool) -> None:
        """The process of a rank ended, and may be what is waited for."""
        if self._waiting is not None and self._waiting[0] == rank:
            self._forget()
            self._tell(reason, by_itself)

    def settle(self) -> None:
        """Wait no longer."""
        if self._waiting is not None:
            _, reason = self._waiting
            self._forget()
            self._tell(reason, True)

    def close(self) -> None:
        """Tell nothing more."""
        self._forget()

    def _forget(self) -> None:
        self._waiting = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
