"""Instances that went without leaving: kept for a while, so that an operator sees who is missing.

Pure. Who is frozen, cut off or dead for longer than its lease is registered no more, and a view of
those who are would say nothing of it. Invariants: an instance is not here while it is registered;
there are MAX_LOST at most, and after a tick none that was silent for longer than LOST_KEPT_S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from xllm.errors import InvariantError

LOST_KEPT_S = 900.0
"""After its last word. Longer than the longest lease: until that ends, its record is there."""
MAX_LOST = 64
"""Where instances come under ever new names and are killed, the latest are shown."""


@dataclasses.dataclass(frozen=True, slots=True)
class LostInstance:
    """What is left to say of one. `heard_at`: when its last heartbeat came, monotonic seconds."""

    name: str
    incarnation: str
    model: str
    role: str
    heard_at: float


class LostInstances:
    """Those of one router's view, by name."""

    def __init__(self) -> None:
        self._found: dict[str, LostInstance] = {}

    def __iter__(self) -> Iterator[LostInstance]:
        return iter(sorted(self._found.values(), key=lambda one: one.name))

    def add(self, lost: LostInstance) -> None:
        """Its record is gone, and it did not leave. Beyond MAX_LOST the one that was heard longest
        ago is forgotten."""
        self._found[lost.name] = lost
        if len(self._found) > MAX_LOST:
            del self._found[min(self._found.values(), key=lambda one: one.heard_at).name]

    def came_back(self, name: str) -> None:
        """It, or another in its place, is registered, of whatever version of the protocol."""
        self._found.pop(name, None)

    def forget_old(self, now: float) -> None:
        """Forget those that were heard last more than LOST_KEPT_S ago."""
        for one in [one for one in self._found.values() if now - one.heard_at > LOST_KEPT_S]:
            del self._found[one.name]

    def check(self) -> None:
        """InvariantError if there are too many."""
        if len(self._found) > MAX_LOST:
            raise InvariantError(f"{len(self._found)} lost instances, {MAX_LOST} at most")
