"""One model's line, and how fast it is served: when to come back. Pure."""

from __future__ import annotations

import dataclasses

from xllm.router.admission.tenants import MAX_RETRY_S, MIN_RETRY_S
from xllm.router.admission.waiting_line import WaitingLine

RATE_S = 5.0
"""The rate at which a line is served is that of about the last so many seconds."""


@dataclasses.dataclass(slots=True)
class ModelLine:
    """Those who wait for an instance of one model."""

    line: WaitingLine
    is_early: bool = False
    """It began when no instance was usable, and one was expected."""
    rate: float = 0.0
    """Requests a second; 0: not known yet."""
    num_served: int = 0
    """Since `counted_at`."""
    counted_at: float = 0.0

    def drain_s(self, now: float) -> float:
        """How long those who wait now will take, at the present rate."""
        elapsed = now - self.counted_at
        rate = self.rate or (self.num_served / elapsed if elapsed > 0 else 0.0)
        if not rate:
            return 1.0
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (len(self.line) + 1) / rate))

    def count(self, now: float) -> None:
        """Call now and then."""
        elapsed = now - self.counted_at
        if elapsed < RATE_S:
            return
        rate = self.num_served / elapsed
        self.rate = (self.rate + rate) / 2 if self.rate else rate
        self.num_served, self.counted_at = 0, now
