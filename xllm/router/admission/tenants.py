"""Limits of tenants: requests and tokens a minute, and open requests. Pure.

A minute's allowance may be used at once (that is the bucket's size), and comes back evenly. New
tokens are known only afterwards: they are charged when a request ends, and a tenant in debt gets
no prompt in until the debt is paid. What a tenant does at other routers counts here, too
(`shared_use`). Tenants without a limit cost nothing and are not remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from xllm.errors import InvalidRequestError, RateLimitError
from xllm.protocol.bus import TenantUse
from xllm.router.admission.bucket import TokenBucket
from xllm.router.admission.shared_use import SharedUse

MAX_RETRY_S = 60.0
"""Of an answer to somebody who must wait for others: nobody knows how long. What a bucket says
is known, and told as it is."""
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
        self._shared = SharedUse()
        self.mean_s = 1.0
        """About how long a request lasts, for saying when to come back."""

    @property
    def num_known(self) -> int:
        """Tenants with something on their account."""
        return len(self._states)

    def limits(self, tenant: str) -> TenantLimits:
        """The limits of a tenant."""
        return self._named.get(tenant, self._others)

    def enter(self, tenant: str, now: float, *, resumed: bool = False) -> bool:
        """A request comes, before anything of it is looked at. RateLimitError where it is one too
        many. Returns whether it is counted: then `leave` must follow.

        `resumed`: it says that another router was lost with it. What that one had open still
        counts as open there, and the request was let in once: it may run into debt, as far as a
        minute's allowance, so that a death fails nobody and a lie gains a minute once."""
        limits = self.limits(tenant)
        if not limits.any:
            return False
        state = self._state(tenant, limits, now)
        most = limits.concurrency
        num_open = state.num_open
        if not resumed:
            num_open += self._shared.num_elsewhere(tenant, now)
        if most and num_open >= most:
            raise RateLimitError(
                f"{most} requests of this tenant are open, as many as may be",
                retry_after_s=_bounded(self.mean_s / most),
            )
        bucket = state.requests
        if bucket is not None and not bucket.take(1, now, bucket.burst if resumed else 0.0):
            raise RateLimitError(
                f"this tenant has used its {limits.requests_per_minute} requests a minute",
                retry_after_s=max(MIN_RETRY_S, bucket.wait_s(1, now)),
            )
        state.num_open += 1
        self._shared.used(tenant, 1, 0)
        return True

    def spend(self, tenant: str, num_tokens: int, now: float, *, resumed: bool = False) -> None:
        """The prompt of a request that entered is known. RateLimitError where it is too much now,
        InvalidRequestError where it always is. `resumed`: see `enter`."""
        state = self._states.get(tenant)
        bucket = state.tokens if state is not None else None
        if bucket is None:
            return
        if num_tokens > bucket.burst:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, but this tenant may use "
                f"{bucket.burst:.0f} a minute",
                param="prompt",
            )
        if not bucket.take(num_tokens, now, bucket.burst if resumed else 0.0):
            raise RateLimitError(
                f"this tenant has used its {bucket.burst:.0f} tokens a minute",
                retry_after_s=max(MIN_RETRY_S, bucket.wait_s(num_tokens, now)),
            )
        self._shared.used(tenant, 0, num_tokens)

    def leave(self, tenant: str, num_new_tokens: int, seconds: float, now: float) -> None:
        """A request that entered has ended after so long, with so many new tokens."""
        self.mean_s += (seconds - self.mean_s) / 16
        state = self._states[tenant]
        state.num_open -= 1
        if state.tokens is not None and num_new_tokens:
            state.tokens.charge(num_new_tokens, now)
            self._shared.used(tenant, 0, num_new_tokens)

    # -- other routers -----------------------------------------------------------------------

    def word(self) -> tuple[TenantUse, ...]:
        """What to tell the other routers now, each time of what came since."""
        num_open = {name: one.num_open for name, one in self._states.items() if one.num_open}
        return self._shared.word(num_open)

    def heard(self, router: str, word: Sequence[TenantUse], now: float) -> None:
        """Another router told what its tenants do: it is charged here, too."""
        self._shared.heard(router, word, now)
        for one in word:
            limits = self.limits(one.tenant)
            if not limits.any:
                continue
            state = self._state(one.tenant, limits, now)
            if state.requests is not None and one.num_requests > 0:
                state.requests.charge(one.num_requests, now)
            if state.tokens is not None and one.num_tokens > 0:
                state.tokens.charge(one.num_tokens, now)

    def _state(self, tenant: str, limits: TenantLimits, now: float) -> TenantState:
        state = self._states.get(tenant)
        if state is None:
            state = self._states[tenant] = TenantState(limits, now)
        return state

    def forget(self, now: float) -> None:
        """Call now and then: drop the accounts of tenants that owe and are owed nothing."""
        self._shared.forget(now)
        for tenant in [name for name, state in self._states.items() if state.is_idle(now)]:
            del self._states[tenant]


def _bucket(per_minute: int, now: float) -> TokenBucket | None:
    return TokenBucket(per_minute / 60, per_minute, now) if per_minute else None


def _bounded(seconds: float) -> float:
    return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds))
