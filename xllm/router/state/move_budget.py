"""How many requests may move at a time: a dying cluster is not hammered by what it lost.

Pure: the time is monotonic seconds. A request's first move is always free and at once: the death
of an instance costs its requests nothing. Every further one, and every refusal after it, takes from
a budget that grows with the requests that come, and a little with time; a request that gets nothing
of it waits, as one for which there is no instance.
"""

from __future__ import annotations

MOVE_SHARE = 0.2
"""Further moves for each new request."""
MOVE_BURST = 256.0
MOVES_PER_S = 20.0


class MoveBudget:
    """What the requests of one router may still spend on moves."""

    __slots__ = ("_at", "left")

    def __init__(self) -> None:
        self.left = MOVE_BURST
        self._at = 0.0

    def arrived(self) -> None:
        """A new request came."""
        if self.left < MOVE_BURST:
            self.left = min(MOVE_BURST, self.left + MOVE_SHARE)

    def take(self, num_moves: int, now: float) -> bool:
        """Whether a request may make its so-manieth move now."""
        if num_moves <= 1:
            return True
        if self._at:
            self.left = min(MOVE_BURST, self.left + (now - self._at) * MOVES_PER_S)
        self._at = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True
