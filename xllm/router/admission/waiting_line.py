"""Requests that wait in the router until an instance has room. Pure.

Online before offline, higher priority first; among equals the tenant that has had the least goes
first (by prompt tokens, start-time fair queueing: who comes back after a pause has saved nothing
up), and a tenant's own requests in their order. A line that is full sends away the last of who
would come last: an offline request before an online one, the lowest priority first, of the
tenant that has the most waiting. Invariants: nobody who stays ranks below somebody who was sent
away; nobody waits past their deadline.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from xllm.errors import InvariantError

SPARE_TENANTS = 64
"""Tenants that are remembered while they do not wait."""
Rank = tuple[bool, int]
"""(online, priority): larger goes first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Waiter:
    """One request that waits."""

    request_id: str
    tenant: str
    online: bool
    priority: int
    cost: int
    """Prompt tokens: what its turn counts for."""
    deadline: float
    joined: float = 0.0

    @property
    def rank(self) -> Rank:
        """Its place among all."""
        return self.online, self.priority


class WaitingLine:
    """Of one model; `size`: waiters at most."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: dict[Rank, dict[str, OrderedDict[str, Waiter]]] = {}
        self._waiters: dict[str, Waiter] = {}
        self._had: dict[str, float] = {}
        """By tenant: what it has had, on the scale of `_clock`."""
        self._clock = 0.0
        """What the tenant served last had had by then."""
        self._earliest = float("inf")
        """No deadline lies before."""

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    def push(self, waiter: Waiter) -> Waiter | None:
        """It waits from now on. Returns who is sent away for it, perhaps itself."""
        self._waiters[waiter.request_id] = waiter
        tenants = self._ranks.setdefault(waiter.rank, {})
        tenants.setdefault(waiter.tenant, OrderedDict())[waiter.request_id] = waiter
        self._had[waiter.tenant] = max(self._had.get(waiter.tenant, 0.0), self._clock)
        self._earliest = min(self._earliest, waiter.deadline)
        if len(self._waiters) <= self._size:
            return None
        last = self._last()
        self._drop(last)
        return last

    def turns_away(self, rank: Rank, tenant: str) -> bool:
        """Whether the line is full, and a waiter of that rank who came now would be the one to
        be sent away (where two tenants have as many waiting, it may be: False)."""
        if len(self._waiters) < self._size:
            return False
        lowest = min(self._ranks, default=rank)
        if rank != lowest:
            return rank < lowest
        tenants = self._ranks.get(rank, {})
        others = max([len(own) for name, own in tenants.items() if name != tenant], default=0)
        return len(tenants.get(tenant, ())) + 1 > others

    def head(self) -> Waiter | None:
        """Whose turn it is."""
        if not self._waiters:
            return None
        tenants = self._ranks[max(self._ranks)]
        tenant = min(tenants, key=lambda name: self._had[name])
        return next(iter(tenants[tenant].values()))

    def pop(self) -> Waiter:
        """The same, which waits no more: it gets what it came for."""
        waiter = self.head()
        assert waiter is not None
        had = self._had[waiter.tenant]
        self._clock = max(self._clock, had)
        self._had[waiter.tenant] = had + max(1, waiter.cost)
        self._drop(waiter)
        if len(self._had) > 2 * len(self._waiters) + SPARE_TENANTS:
            self._forget()
        return waiter

    def remove(self, request_id: str) -> bool:
        """It waits no more, for whatever reason. False: it did not."""
        waiter = self._waiters.get(request_id)
        if waiter is not None:
            self._drop(waiter)
        return waiter is not None

    def expire(self, now: float) -> list[Waiter]:
        """Take out all whose deadline has come."""
        if now < self._earliest:
            return []
        late = [one for one in self._waiters.values() if one.deadline <= now]
        for one in late:
            self._drop(one)
        left = self._waiters.values()
        self._earliest = min((one.deadline for one in left), default=float("inf"))
        return late

    def _forget(self) -> None:
        """Of tenants that do not wait, keep those that had the most: the others have the least to
        lose by beginning anew, at the clock."""
        waiting = {one.tenant for one in self._waiters.values()}
        others = sorted(self._had.keys() - waiting, key=self._had.__getitem__)
        for name in others[: -SPARE_TENANTS // 2]:
            del self._had[name]

    def _last(self) -> Waiter:
        tenants = self._ranks[min(self._ranks)]
        most = max(tenants.values(), key=len)
        return next(reversed(most.values()))

    def _drop(self, waiter: Waiter) -> None:
        del self._waiters[waiter.request_id]
        tenants = self._ranks[waiter.rank]
        own = tenants[waiter.tenant]
        del own[waiter.request_id]
        if not own:
            del tenants[waiter.tenant]
            if not tenants:
                del self._ranks[waiter.rank]

    def check(self) -> None:
        """InvariantError if the two tables differ, or there are too many."""
        listed = [
            one
            for tenants in self._ranks.values()
            for own in tenants.values()
            for one in own.values()
        ]
        if len(listed) != len(self._waiters) or len(listed) > self._size:
            raise InvariantError(f"{len(listed)} listed, {len(self._waiters)} wait")
        if any(one.deadline < self._earliest for one in listed):
            raise InvariantError("a deadline lies before the earliest")
