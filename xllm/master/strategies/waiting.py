"""Who starts next: the interface of the queues of waiting sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from xllm.master.sequence import Sequence


class WaitingOrder(Protocol):
    """Sequences in state WAITING, in the order in which they may start. Invariant: what is
    pushed is given by `pop` once, unless it left the state by another door."""

    def __len__(self) -> int:
        """How many wait."""
        ...

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in any order."""
        ...

    def push(self, seq: Sequence) -> None:
        """Add a sequence that waits. Its key must not be in the queue already."""
        ...

    def peek(self, now: float) -> Sequence | None:
        """The next sequence, which stays in the queue."""
        ...

    def pop(self) -> Sequence:
        """Remove what `peek` just returned."""
        ...

    def put_back(self, seq: Sequence) -> None:
        """What was popped for a look waits on, as if it had never left."""
        ...

    def note_gone(self, seq: Sequence) -> None:
        """A queued sequence has left the state WAITING by another door."""
        ...
