"""Limits of tenants: requests and tokens a minute, and open requests. Pure.

A minute's allowance may be used at once (that is the bucket's size), and comes back evenly. New
tokens are known only afterwards: they are charged when a request ends, and a tenant in debt gets
no prompt in until the debt is paid. Tenants without a limit cost nothing and are not remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from xllm.errors import InvalidRequestError, RateLimitError
from xllm.router.admission.bucket import TokenBucket

MAX_RETRY_S = 60.0
"""Of an answer to somebody who must wait: a minute brings all of an allowance back."""
MIN_RETRY_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class TenantLimits:
    """Of one tenant; 0: no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrency)


class TenantState:
    """What a limited tenant has used."""

    __slots__ = ("limits", "num_open", "requests", "tokens")

    def __init__(self, limits: TenantLimits, now: float) -> None:
        self.limits = limits
        self.requests = _bucket(limits.requests_per_minute, now)
        self.tokens = _bucket(limits.tokens_per_minute, now)
        self.num_open = 0

    def is_idle(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting it."""
        buckets = (self.requests, self.tokens)
        return not self.num_open and all(b is None or b.is_full(now) for b in buckets)


class TenantGate:
    """Counts tenants against their limits. `named`: limits of tenants by name; `others`: those
    of everybody else, each on their own."""

    def __init__(self, named: Mapping[str, TenantLimits], others: TenantLimits) -> None:
        self._named = dict(named)
        self._others = others
        self._states: dict[str, TenantState] = {}
        self.mean_s = 1.0
        """About how long a request lasts, for saying when to come back."""

    @property
    def num_known(self) -> int:
        """Tenants with something on their account."""
        return len(self._states)

    def limits(self, tenant: str) -> TenantLimits:
        """The limits of a tenant."""
        return self._named.get(tenant, self._others)

    def enter(self, tenant: str, now: float) -> bool:
        """A request comes, before anything of it is looked at. RateLimitError where it is one too
        many. Returns whether it is counted: then `leave` must follow."""
        limits = self.limits(tenant)
        if not limits.any:
            return False
        state = self._states.get(tenant)
        if state is None:
            state = self._states[tenant] = TenantState(limits, now)
        most = limits.concurrency
        if most and state.num_open >= most:
            raise RateLimitError(
                f"{most} requests of this tenant are open, as many as may be",
                retry_after_s=_bounded(self.mean_s / most),
            )
        bucket = state.requests
        if bucket is not None and not bucket.take(1, now):
            raise RateLimitError(
                f"this tenant has used its {limits.requests_per_minute} requests a minute",
                retry_after_s=_bounded(bucket.wait_s(1, now)),
            )
        state.num_open += 1
        return True

    def spend(self, tenant: str, num_tokens: int, now: float) -> None:
        """The prompt of a request that entered is known. RateLimitError where it is too much now,
        InvalidRequestError where it always is."""
        state = self._states.get(tenant)
        bucket = state.tokens if state is not None else None
        if bucket is None or bucket.take(num_tokens, now):
            return
        if num_tokens > bucket.burst:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, but this tenant may use "
                f"{bucket.burst:.0f} a minute",
                param="prompt",
            )
        raise RateLimitError(
            f"this tenant has used its {bucket.burst:.0f} tokens a minute",
            retry_after_s=_bounded(bucket.wait_s(num_tokens, now)),
        )

    def leave(self, tenant: str, num_new_tokens: int, seconds: float, now: float) -> None:
        """A request that entered has ended after so long, with so many new tokens."""
        self.mean_s += (seconds - self.mean_s) / 16
        state = self._states[tenant]
        state.num_open -= 1
        if state.tokens is not None and num_new_tokens:
            state.tokens.charge(num_new_tokens, now)

    def forget(self, now: float) -> None:
        """Call now and then: drop the accounts of tenants that owe and are owed nothing."""
        for tenant in [name for name, state in self._states.items() if state.is_idle(now)]:
            del self._states[tenant]


def _bucket(per_minute: int, now: float) -> TokenBucket | None:
    return TokenBucket(per_minute / 60, per_minute, now) if per_minute else None


def _bounded(seconds: float) -> float:
    return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds))
