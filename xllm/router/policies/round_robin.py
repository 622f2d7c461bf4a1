"""Each instance in turn, whatever it does."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.router.policies.question import RouteFigures, RouteQuestion, Stages
from xllm.router.view import InstanceView


class RoundRobin:
    """The next by name after the one chosen last."""

    def __init__(self, figures: RouteFigures) -> None:
        self._figures = figures
        self._last = ""

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """Whose turn it is."""
        last = self._last
        names = [one.record.name for one in candidates]
        name = min([name for name in names if name > last] or names)
        self._last = name
        self._figures.count("turn")
        return (("both", name),)
