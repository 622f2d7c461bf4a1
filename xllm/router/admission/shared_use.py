"""What routers tell each other of limited tenants, so that a limit is the cluster's. Pure.

A word says how many requests of a tenant are open at a router, and what the tenant used there
since the word before: that is charged at the others, too. A word that is lost counts for nothing,
and what is not told yet is not known: within a heartbeat each router may let in what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xllm.protocol.bus import TenantUse

MAX_TOLD = 128
"""Tenants in one word: those that used something, the longest untold first, then those with the
most open requests."""
HEARD_S = 1.0
"""A router silent for so long is not believed to have requests open."""


class SharedUse:
    """Of one router."""

    def __init__(self) -> None:
        self._untold: dict[str, tuple[int, int]] = {}
        """By tenant: requests and tokens used here, since they were told of."""
        self._elsewhere: dict[str, tuple[float, dict[str, int]]] = {}
        """By other router: when it spoke, and open requests by tenant."""

    def used(self, tenant: str, num_requests: int, num_tokens: int) -> None:
        """A tenant used so much here."""
        requests, tokens = self._untold.get(tenant, (0, 0))
        self._untold[tenant] = (requests + num_requests, tokens + num_tokens)

    def word(self, num_open: Mapping[str, int]) -> tuple[TenantUse, ...]:
        """What to tell the others now. `num_open`: open requests here by tenant, none at 0."""
        rest = sorted(num_open.keys() - self._untold.keys(), key=lambda name: -num_open[name])
        names = [*self._untold, *rest][:MAX_TOLD]
        return tuple(
            TenantUse(name, num_open.get(name, 0), *self._untold.pop(name, (0, 0)))
            for name in names
        )

    def heard(self, router: str, word: Iterable[TenantUse], now: float) -> None:
        """Another router spoke."""
        self._elsewhere[router] = (now, {one.tenant: one.num_open for one in word if one.num_open})

    def num_elsewhere(self, tenant: str, now: float) -> int:
        """Open requests of a tenant at other routers."""
        oldest = now - HEARD_S
        return sum(
            counts.get(tenant, 0)
            for heard_at, counts in self._elsewhere.values()
            if heard_at >= oldest
        )

    def forget(self, now: float) -> None:
        """Call now and then: drop routers that are gone."""
        for router, (heard_at, _) in list(self._elsewhere.items()):
            if heard_at < now - HEARD_S:
                del self._elsewhere[router]
