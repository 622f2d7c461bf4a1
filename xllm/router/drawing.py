"""Random bytes of the system, fetched for many requests at a time: a system call costs more than
all that a request's id and seed are used for.
"""

from __future__ import annotations

import os

FETCH_BYTES = 3072


class RandomBytes:
    """Gives each byte once. Used from the loop's thread only."""

    __slots__ = ("_fetched", "_next")

    def __init__(self) -> None:
        self._fetched = b""
        self._next = 0

    def take(self, count: int) -> bytes:
        """So many bytes that nobody can foretell; at most FETCH_BYTES."""
        start = self._next
        if start + count > len(self._fetched):
            self._fetched = os.urandom(FETCH_BYTES)
            start = 0
        self._next = start + count
        return self._fetched[start : start + count]
