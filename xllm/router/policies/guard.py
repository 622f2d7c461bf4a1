"""The hot-spot guard: affinity yields where an instance has far more requests than others.

Whatever speaks for an instance (a cached prefix, a session), it gets no request that would have
it at more than `spread` requests above the least busy candidate, unless it is within `ratio`
times the mean of all. Both bounds must be passed: a few requests more are harmless on a busy
cluster, and a large ratio is harmless on an idle one.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.router.policies.load import num_requests
from xllm.router.process_views import InstanceView


class ImbalanceGuard:
    """`spread`: requests, `ratio`: of the mean, at least 1."""

    __slots__ = ("ratio", "spread")

    def __init__(self, spread: int, ratio: float) -> None:
        self.spread = spread
        self.ratio = ratio

    def limit(self, loads: Sequence[int]) -> float:
        """The most requests that an instance may have and still get another by affinity. Never
        below the smallest of `loads`, so that somebody is always within it."""
        return max(min(loads) + self.spread, self.ratio * sum(loads) / len(loads))

    def within(self, candidates: Sequence[InstanceView]) -> Sequence[InstanceView]:
        """The candidates that may get requests by affinity; never empty."""
        loads = [num_requests(one) for one in candidates]
        limit = self.limit(loads)
        if max(loads) <= limit:
            return candidates
        return [one for one, load in zip(candidates, loads, strict=True) if load <= limit]
