"""Each instance in turn, whatever it does."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.router.policies.question import RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


class RoundRobin:
    """The next by name after the one chosen last."""

    def __init__(self, figures: RouteFigures) -> None:
        self._figures = figures
        self._last = ""

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """Whose turn it is."""
        last = self._last
        first = following = ""
        for one in candidates:
            name = one.record.name
            if name > last and (not following or name < following):
                following = name
            if not first or name < first:
                first = name
        name = self._last = following or first
        self._figures.count("turn")
        return (("both", name),)
