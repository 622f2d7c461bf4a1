"""What a request remembers of the instances that did not serve it to its end.

Decides when to try again, when to wait and when to give up; knows neither tokens nor messages.
Four things can happen to an attempt: the instance refuses it, dies under it, loses words of it, or
is given up for a better place. A death speaks against the request only where it may be the reason:
a worker that ended by itself in a step of it, a step that failed, or a master whose state broke;
and until it has passed where that happened. After two of them it runs alone: the next one convicts
it, or it passes. Invariants: no request is given up for deaths that others may be the reason of,
and none is convicted before its second; whoever has been refused everywhere learns so within
PATIENCE_S.
"""

from __future__ import annotations

import msgspec

from xllm.errors import InvariantError, OverloadedError, UnavailableError

MAX_MOVES = 5
"""Attempts that were lost, beyond the first, before a request is given up. Refusals cost an
instance nothing and are bounded by time."""
MAX_DEATHS = 2
"""Deaths that speak against a request before it is one of few that may be the cause of them."""
PATIENCE_S = 30.0
"""How long a request that lost its instance, or holds tokens, waits for another."""


class MoveRecord(msgspec.Struct, eq=False, gc=False):
    """The moves of one request."""

    num_moves: int = 0
    """Attempts that did not end, whatever the reason."""
    num_lost: int = 0
    """Those that were not refused."""
    num_deaths: int = 0
    """Those of them that speak against it."""
    died_at: frozenset[str] = frozenset()
    """The instances where it had these."""
    is_convicted: bool = False
    """It was given up for them."""
    avoid: frozenset[str] = frozenset()
    """Instances that refused it since it was last accepted."""
    last_refusal: str = ""
    homeless_since: float = 0.0
    resumed: bool = False
    """Whether it was lost with another router before it came here."""

    def refused(self, instance: str, code: str) -> None:
        """That instance took it not, and said why."""
        self.avoid |= {instance}
        self.last_refusal = code
        self.num_moves += 1

    @property
    def has_been_placed(self) -> bool:
        """Whether an instance was asked for it, here or by another router that was lost."""
        return self.num_moves > 0 or self.resumed

    @property
    def runs_alone(self) -> bool:
        """Whether it must not share steps: too many died under it and others."""
        return self.num_deaths >= MAX_DEATHS

    def passed(self) -> None:
        """It is past where these deaths happened."""
        self.num_deaths = 0
        self.died_at = frozenset()

    def died(self, instance: str, *, shared: bool) -> str:
        """An attempt ended with a worker, or a master, that it may have ended; `shared`: or one of
        others. It goes on elsewhere; or why it may not."""
        self.num_deaths += 1
        self.died_at |= {instance}
        if self.num_deaths >= MAX_DEATHS and not shared:
            self.is_convicted = True
            return f"given up: {self.num_deaths} times an instance died while it ran this request"
        return self.lost()

    def lost(self) -> str:
        """An attempt that was accepted goes on elsewhere; or why it may not."""
        if self.num_lost >= MAX_MOVES:
            return f"given up after {self.num_lost + 1} attempts"
        self.num_lost += 1
        self.num_moves += 1
        return ""

    def accepted(self) -> None:
        """The present attempt runs: what came before no longer matters."""
        self.avoid = frozenset()
        self.last_refusal = ""
        self.homeless_since = 0.0

    def homeless(self, now: float, *, has_tokens: bool) -> tuple[str, str] | None:
        """No instance takes it now: (code, message) to fail with, or None: wait, and then ask
        everybody again."""
        if self.last_refusal == OverloadedError.code and not has_tokens:
            return OverloadedError.code, "every instance's queue is full"
        if not self.has_been_placed:
            return UnavailableError.code, "no instance is ready"
        if not self.homeless_since:
            self.homeless_since = now
        if now - self.homeless_since > PATIENCE_S:
            code = self.last_refusal or UnavailableError.code
            return code, "its instance was lost and no other took it"
        self.avoid = frozenset()
        return None

    def held_back(self, now: float) -> tuple[str, str] | None:
        """It may not move yet: (code, message) to fail with, or None: wait."""
        if not self.homeless_since:
            self.homeless_since = now
        if now - self.homeless_since <= PATIENCE_S:
            return None
        return UnavailableError.code, "it was lost more than once, and too many others with it"

    def check(self) -> None:
        """InvariantError if the counts cannot be."""
        if self.num_lost > MAX_MOVES or self.num_deaths > self.num_lost + 1:
            raise InvariantError(f"{self.num_deaths} deaths, {self.num_lost} lost attempts")
