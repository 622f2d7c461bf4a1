"""What the ranks of an instance tell each other before they are connected: a board of notices.

Notices travel by way of the master, over the connections that are there already (with the node's
keys, where it has any): no further port, file or store is needed. One thread puts and waits,
another one hears.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from xllm.errors import EngineError


class RankBoard:
    """The notices of one meeting of the ranks, which goes by the name `group`. A meeting of
    another name takes its place: it is closed then, and who waits for a notice is told."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._tell: Callable[[str, bytes], None] | None = None
        self._notices: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def open(self, tell: Callable[[str, bytes], None]) -> None:
        """From now on `tell(key, value)` carries what is put here to the other ranks."""
        self._tell = tell

    def put(self, key: str, value: bytes) -> None:
        """A notice of this rank, for all."""
        assert self._tell is not None
        self.hear(key, value)
        self._tell(key, value)

    def hear(self, key: str, value: bytes) -> None:
        """A notice of another rank. Any thread."""
        with self._changed:
            self._notices[key] = value
            self._changed.notify_all()

    def get(self, key: str, timeout_s: float) -> bytes:
        """The notice of that key, once it is there. EngineError where it does not come."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._notices, timeout_s)
            if self._closed:
                raise EngineError("the ranks meet under another name")
            if key not in self._notices:
                raise EngineError(f"a rank of the instance did not come within {timeout_s:.0f} s")
            return self._notices[key]

    def has(self, key: str) -> bool:
        """Whether that notice is there."""
        with self._changed:
            return key in self._notices

    def close(self) -> None:
        """Nobody meets here any more. Any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def is_closed_within(self, timeout_s: float) -> bool:
        """Wait for the end of the meeting: whether it came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, timeout_s)
