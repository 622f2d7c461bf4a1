"""Fairness between tenants: virtual token counters, after Sheng et al., "Fairness in Serving
Large Language Models" (OSDI 2024).

Each tenant has a counter of the service that it had, prompt tokens and output tokens weighted, by
its share. The waiting tenant with the smallest counter goes next. A tenant that comes back from
having nothing to wait for is lifted to the smallest counter of those that wait, or, where none
does, of the tenant that waited last: nobody saves up service. Online requests go before
offline ones whoever asks; priorities order a tenant's own requests. Invariant: the counters of
tenants that always had somebody waiting differ by at most `bound()`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from xllm.master.sequence import Sequence, SequencePhase

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""Prices of a computed prompt token and of an output token, as in the paper."""


class TokenCounters:
    """Service by tenant, in weighted tokens a unit of share."""

    __slots__ = ("_counts", "_last", "_shares")

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self._shares = dict(shares or {})
        self._counts: dict[str, float] = {}
        self._last = 0.0

    def count(self, tenant: str) -> float:
        """What a tenant had."""
        return self._counts.get(tenant, 0.0)

    def charge(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """A tenant is given service."""
        work = PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
        self._counts[tenant] = self.count(tenant) + work / self._shares.get(tenant, 1.0)

    def arrive(self, tenant: str, waiting: Iterator[str]) -> None:
        """A tenant waits again; `waiting`: those that already did."""
        floor = min(map(self.count, waiting), default=self._last)
        self._counts[tenant] = max(self.count(tenant), floor)

    def leave(self, tenant: str) -> None:
        """A tenant has nobody waiting any more."""
        self._last = self.count(tenant)

    def forget_idle(self, waiting: Mapping[str, object]) -> None:
        """Drop counters that say nothing: those of idle tenants who would be lifted anyway."""
        if len(self._counts) > 2 * len(waiting) + 1024:
            floor = min(map(self.count, waiting), default=self._last)
            self._counts = {
                name: count
                for name, count in self._counts.items()
                if name in waiting or count > floor
            }


def bound(longest_prompt: int, capacity: int, smallest_share: float = 1.0) -> float:
    """How far the counters of two tenants that always wait can be apart (the paper's Theorem
    4.4, by the smaller share): twice what one choice, or all tokens in memory, may cost."""
    return 2 * max(PROMPT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * capacity) / smallest_share


class FairQueue:
    """Waiting sequences by tenant. The interface of WaitingQueue."""

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self.counters = TokenCounters(shares)
        # By tenant; keys of sequences are unique, hence no two entries are equal.
        self._heaps: dict[str, list[tuple[tuple[bool, int, int, int], Sequence]]] = {}
        self._num_live: dict[str, int] = {}
        self._chosen = ""

    def __len__(self) -> int:
        return sum(self._num_live.values())

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        waiting = SequencePhase.WAITING
        return (seq for h in self._heaps.values() for _, seq in h if seq.state is waiting)

    def push(self, seq: Sequence) -> None:
        """Add a sequence that waits. Its key must not be in the queue already."""
        tenant = seq.request.message.tenant
        if not self._num_live.get(tenant):
            self.counters.arrive(tenant, iter(tuple(self._num_live)))
            self.counters.forget_idle(self._num_live)
        self.put_back(seq)

    def put_back(self, seq: Sequence) -> None:
        """What was popped for a look waits on, as if it had never left."""
        tenant = seq.request.message.tenant
        heapq.heappush(self._heaps.setdefault(tenant, []), (seq.key, seq))
        self._num_live[tenant] = self._num_live.get(tenant, 0) + 1

    def peek(self, now: float) -> Sequence | None:
        """The first sequence of the tenant whose turn it is; it stays in the queue."""
        best: tuple[bool, float, tuple[bool, int, int, int]] | None = None
        found = None
        for tenant in tuple(self._heaps):
            seq = self._first(tenant)
            if seq is None:
                continue
            rank = (seq.key[0], self.counters.count(tenant), seq.key)
            if best is None or rank < best:
                best, found, self._chosen = rank, seq, tenant
        return found

    def pop(self) -> Sequence:
        """Remove what `peek` just returned."""
        _, seq = heapq.heappop(self._heaps[self._chosen])
        self._leave(self._chosen)
        return seq

    def note_gone(self, seq: Sequence) -> None:
        """A queued sequence has left the state WAITING by another door."""
        self._leave(seq.request.message.tenant)

    def _first(self, tenant: str) -> Sequence | None:
        heap = self._heaps[tenant]
        while heap and heap[0][1].state is not SequencePhase.WAITING:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _leave(self, tenant: str) -> None:
        self._num_live[tenant] -= 1
        if not self._num_live[tenant]:
            del self._num_live[tenant]
            del self._heaps[tenant]
            self.counters.leave(tenant)
