"""Any instance, drawn: what others are compared with.

The draws are a hash of the seed and a counter, so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from xllm.router.policies.question import RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


class SeededRandom:
    """Each candidate with the same chance."""

    def __init__(self, seed: int, figures: RouteFigures) -> None:
        self._key = seed.to_bytes(8, "little")
        self._figures = figures
        self._count = 0

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The next draw."""
        self._count += 1
        count = self._count.to_bytes(8, "little")
        drawn = int.from_bytes(blake2b(count, key=self._key, digest_size=8).digest(), "little")
        self._figures.count("random")
        return (("both", candidates[drawn % len(candidates)].name),)
