"""The instance with the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.router.policies.last_chosen import LastChosen
from xllm.router.policies.load import num_requests, queued_tokens
from xllm.router.policies.question import RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


class LeastLoad:
    """Fewest requests; of equals the fewest prompt tokens before its own, then the least lately
    chosen. Knows nothing of caches."""

    def __init__(self, figures: RouteFigures) -> None:
        self._figures = figures
        self._chosen = LastChosen()

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The least loaded."""
        best = candidates[0] if len(candidates) == 1 else min(candidates, key=self._cost)
        self._figures.count("load")
        return self._chosen.take(best.name)

    def _cost(self, one: InstanceView) -> tuple[int, int, int]:
        return num_requests(one), queued_tokens(one), self._chosen[one.name]
