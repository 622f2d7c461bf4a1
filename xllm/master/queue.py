"""Waiting sequences in the order in which they may start, and deadlines in the order they pass.

Online before offline, higher priority first, then by arrival: a preempted sequence keeps its
arrival and so comes back at the front of its class. Entries of sequences and requests that ended
meanwhile are skipped when they surface, and swept when they are the majority.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from xllm.master.request import RequestState
from xllm.master.sequence import Sequence, SequencePhase

_SPARE = 64
"""So few entries of what has ended are not worth a sweep."""


class WaitingQueue:
    """A priority queue of sequences in state WAITING."""

    __slots__ = ("_heap", "_num_live")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[bool, int, int, int], Sequence]] = []
        self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (seq for _, seq in self._heap if seq.state is SequencePhase.WAITING)

    def push(self, seq: Sequence) -> None:
        """Add a sequence that waits. Its key must not be in the queue already."""
        heapq.heappush(self._heap, (seq.key, seq))
        self._num_live += 1

    def peek(self, now: float) -> Sequence | None:
        """The next sequence, which stays in the queue."""
        heap = self._heap
        while heap:
            seq = heap[0][1]
            if seq.state is SequencePhase.WAITING:
                return seq
            heapq.heappop(heap)
        return None

    def pop(self) -> Sequence:
        """Remove what `peek` just returned."""
        self._num_live -= 1
        return heapq.heappop(self._heap)[1]

    def put_back(self, seq: Sequence) -> None:
        """What was popped for a look waits on, as if it had never left."""
        self.push(seq)

    def note_gone(self, seq: Sequence) -> None:
        """A queued sequence has left the state WAITING by another door."""
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + _SPARE:
            self._heap = [e for e in self._heap if e[1].state is SequencePhase.WAITING]
            heapq.heapify(self._heap)


class DeadlineQueue:
    """Requests by a time that something of theirs ends at."""

    __slots__ = ("_heap", "_num_pushed")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestState]] = []
        self._num_pushed = 0

    def push(self, request: RequestState, deadline: float) -> None:
        """Watch a request until `deadline`."""
        self._num_pushed += 1
        heapq.heappush(self._heap, (deadline, self._num_pushed, request))

    def pop_passed(self, now: float) -> list[RequestState]:
        """Requests whose time is not after `now`, some of them perhaps ended already."""
        passed = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            passed.append(heapq.heappop(heap)[2])
        return passed

    def sweep(self, num_open: int) -> None:
        """Drop entries of ended requests where they outnumber the `num_open` others: each holds
        its prompt."""
        if len(self._heap) > 2 * num_open + _SPARE:
            self._heap = [entry for entry in self._heap if entry[2].open_choices]
            heapq.heapify(self._heap)

    def next_deadline(self) -> float | None:
        """When `pop_passed` may next give something."""
        return self._heap[0][0] if self._heap else None
