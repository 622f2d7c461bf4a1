"""Tokens of a sequence that a device has drawn, or is about to, and the host has not seen yet.

They stand in the sequence's output as placeholders. Invariant: they are its last tokens, and are
settled from the first on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from xllm.errors import InvariantError

PENDING = -1
"""A placeholder."""


class PendingTokens:
    """The placeholders of one sequence: at which position, and where the device keeps the token."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, position: int, source: int) -> None:
        """A token at a position (absolute in prompt + output) is drawn to place `source`."""
        if self._waiting and position != self._waiting[-1][0] + 1:
            raise InvariantError(f"token {position} is drawn behind {self._waiting[-1][0]}")
        self._waiting.append((position, source))

    def settle(self) -> int:
        """The position of the first one, which is known from now on."""
        return self._waiting.popleft()[0]

    def between(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(distance from `start`, source) of those at positions [start, end)."""
        for position, source in self._waiting:
            if start <= position < end:
                yield position - start, source
