"""How often, and how soon, what was lost with a router is asked for again.

Pure: the time (monotonic seconds) and the chance (0 to 1) are given. A router's death is no fault
of the requests that it had: each is asked for again once, at once. Whatever is lost a second time
may be the cause, or the cluster may be dying: from then on a budget paces all requests of a
client together, and a count ends each.
"""

from __future__ import annotations

MAX_LOSSES = 8
"""Routers that a request may be lost with before it is given up."""
RETRY_SHARE = 0.2
"""Of the requests that were opened: so many may be asked for a further time."""
RETRY_BURST = 64.0
RETRIES_PER_S = 10.0
"""What the budget gains by time alone: nobody waits forever."""
FIRST_TRY_S = 0.2
LONGEST_TRY_S = 2.0


def is_paced(num_losses: int) -> bool:
    """Whether a request that was lost so often waits for the budget."""
    return num_losses > 1


class RetryBudget:
    """What further tries may cost, in requests."""

    def __init__(self, now: float) -> None:
        self._left = RETRY_BURST
        self._at = now

    def opened(self) -> None:
        """One more request was made."""
        self._left = min(RETRY_BURST, self._left + RETRY_SHARE)

    def take(self, now: float) -> bool:
        """Whether a request that was lost more than once may be asked for again now."""
        self._left = min(RETRY_BURST, self._left + (now - self._at) * RETRIES_PER_S)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def try_time(num_tries: int, num_routers: int, chance: float) -> float:
    """Seconds that a router gets to answer before the next one is tried. All routers get a first
    short try; then the time doubles with each round, less up to a third by chance, so that clients
    that lost the same router do not knock together."""
    rounds = min(num_tries // max(1, num_routers), 16)
    return min(LONGEST_TRY_S, FIRST_TRY_S * 2.0**rounds) * (1.0 - chance / 3.0)
