"""Requests of one session go to one instance, as long as that is there and not overrun.

Rendezvous hashing (Thaler and Ravishankar, 1998): a session's instance is the one with the
largest hash of (tenant, session, instance). An instance that leaves moves only its own sessions,
and one that joins takes about 1/n of all. Where the guard says no, and for requests without a
session, another policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from xllm.router.policies.guard import ImbalanceGuard
from xllm.router.policies.question import Policy, RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


class SessionAffinity:
    """Wraps `inner`."""

    def __init__(self, inner: Policy, guard: ImbalanceGuard, figures: RouteFigures) -> None:
        self._inner = inner
        self._guard = guard
        self._figures = figures

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The session's instance, or what `inner` chooses."""
        if not ask.session or len(candidates) == 1:
            return self._inner.choose(candidates, ask)
        home = rendezvous([one.name for one in candidates], ask.tenant, ask.session)
        allowed = self._guard.within(candidates)
        if any(one.name == home for one in allowed):
            held = ask.cached.get(home)
            hit_blocks = 0 if held is None else max(held.device, held.dram, held.ssd)
            self._figures.count("session", hit_blocks)
            return (("both", home),)
        self._figures.num_yields += 1
        return self._inner.choose(allowed, ask)


def rendezvous(names: Sequence[str], tenant: str, session: str) -> str:
    """The name that this session belongs to."""
    session_key = blake2b(f"{len(tenant)}:{tenant}{session}".encode(), digest_size=32).digest()
    return max(
        names,
        key=lambda name: (blake2b(name.encode(), key=session_key, digest_size=8).digest(), name),
    )
