"""Results that are kept under their names until others need the room: bounded in bytes.

Knows nothing of what it keeps, save that a name stands for one value for ever: losing an entry
costs time only. Used from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

ENTRY_BYTES = 250
"""What an entry costs beside its value: its name and its place."""


class KeptBytes:
    """The values that were used last, `max_bytes` of them at most."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: Hashable) -> bytes | None:
        """The value of that name, or None where it is not (any more) kept."""
        with self._lock:
            value = self._values.get(name)
            if value is not None:
                self._values.move_to_end(name)
            return value

    def put(self, name: Hashable, value: bytes) -> None:
        """Keep a value; those that were not used for longest give way."""
        size = len(value) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        with self._lock:
            if name in self._values:
                return
            self._values[name] = value
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                _, gone = self._values.popitem(last=False)
                self.num_bytes -= len(gone) + ENTRY_BYTES
