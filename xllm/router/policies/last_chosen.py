"""Ties: of instances that cost the same, the one that was chosen least lately."""

from __future__ import annotations

from xllm.router.policies.question import Stages


class LastChosen:
    """When each instance was last chosen, counted in choices."""

    __slots__ = ("_chosen", "_count")

    def __init__(self) -> None:
        self._chosen: dict[str, int] = {}
        self._count = 0

    def __getitem__(self, name: str) -> int:
        """The number of its last choice; 0: never chosen."""
        return self._chosen.get(name, 0)

    def take(self, name: str) -> Stages:
        """It is chosen now: the route to it."""
        self._count += 1
        self._chosen[name] = self._count
        if len(self._chosen) > MAX_NAMES:
            self._chosen.pop(min(self._chosen, key=self._chosen.__getitem__))
        return (("both", name),)


MAX_NAMES = 1024
"""Instances remembered: names of those that came and went must not pile up."""
