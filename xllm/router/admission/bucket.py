"""A token bucket: so much a second on average, so much at once at most. Pure."""

from __future__ import annotations

from xllm.errors import InvariantError


class TokenBucket:
    """Full at first. Invariant: what was taken by time t is at most burst + rate * t; debts
    (`charge`) come on top and are worked off first."""

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate`: a second; both positive."""
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """How long until so much is there, with nothing taken meanwhile; 0: it is there. More
        than `burst` never is: infinity."""
        if amount > self.burst:
            return float("inf")
        missing = amount - self._filled(now)
        return max(0.0, missing / self.rate)

    def take(self, amount: float, now: float, debt: float = 0.0) -> bool:
        """Take it all, or nothing; what is not there may be owed, up to `debt`."""
        level = self._filled(now)
        if amount > level + debt:
            return False
        self._level = level - amount
        return True

    def charge(self, amount: float, now: float) -> None:
        """Take what was used already, whether it is there or not."""
        self._level = self._filled(now) - amount

    def is_full(self, now: float) -> bool:
        """Whether it is as good as new."""
        return self._filled(now) >= self.burst

    def _filled(self, now: float) -> float:
        if now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
            self._at = now
        return self._level

    def check(self) -> None:
        """InvariantError if it holds more than it can."""
        if self._level > self.burst:
            raise InvariantError(f"a bucket of {self.burst} holds {self._level}")
