"""How much of the time captures may take while an engine serves. Pure: the time is given.

A capture stops the engine: the device is waited for, and torch gives its cached memory back. So one
that cost t seconds is followed by at least t x (1 / share - 1) without another.
"""

from __future__ import annotations


class CaptureBudget:
    """Whether a capture may begin now. `share`: of the time, at most, in the long run; between 0
    and 1, 1 for no bound."""

    def __init__(self, share: float) -> None:
        assert 0 < share <= 1
        self._share = share
        self._closed_until_s = float("-inf")

    def allows(self, now_s: float) -> bool:
        """Whether a capture may begin."""
        return now_s >= self._closed_until_s

    def spend(self, now_s: float, cost_s: float) -> None:
        """A capture has ended that took so long. Several in a row add up."""
        began_s = max(now_s - cost_s, self._closed_until_s)
        self._closed_until_s = began_s + cost_s / self._share
