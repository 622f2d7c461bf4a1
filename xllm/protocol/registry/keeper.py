"""Keeps a process registered: one key under one lease, for as long as the process wants.

It renews at half of what remains, counted from when the last renewal was sent, and every
`_RENEWAL_S` at least; a lease that is gone is replaced and the same key put again, after an outage
not by all at once. A key that went while its lease stands (somebody deleted it, or a write of ours
under an earlier lease came late and went with that) is put again, too. A registry that does not
answer changes nothing here (fail static): `degraded` says so, and trying goes on. It does not know
what the record means. A record under another's lease stays: the later of two processes of one name
is found, and the earlier one says so.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import structlog

from xllm.errors import FencedError, OverloadedError, TransportError, XllmError
from xllm.protocol.registry.interface import Registry
from xllm.protocol.transport.context import describe_error

_log = structlog.get_logger("registration")
_MIN_PAUSE_S = 0.2
_MAX_PAUSE_S = 2.0
_RENEWAL_S = 1.5
"""A lease that somebody revoked is missed within this time."""
_LOOK_S = 5.0
"""How often a renewal is followed by a look at whether the key is there."""
_JITTER_S = 1.0
"""Owners whose leases lapsed in an outage come back within this time of its end."""


class Registration:
    """The record of this process under `key`, written as `value()` gives it at each put."""

    def __init__(
        self,
        registry: Registry,
        key: str,
        value: Callable[[], bytes],
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.key = key
        self.lease_id = 0
        self.num_registrations = 0
        self._registry = registry
        self._value = value
        self._ttl_s = ttl_s
        self._clock = clock
        self._spread = spread
        self._expires_at = 0.0
        self._looked_at = 0.0
        self._degraded = False
        self._is_stale = False
        self._rival_lease = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def degraded(self) -> bool:
        """Whether the last renewal failed: others may not see this process before long."""
        return self._degraded

    async def start(self) -> None:
        """Register, and keep it so. TransportError: the registry does not answer."""
        await self._register()
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"keep {self.key}")

    async def refresh(self) -> None:
        """Write the record again, as `value()` gives it now. A registry that does not answer
        gets it with the next renewal that it does answer."""
        self._is_stale = True
        try:
            await self._write_again()
        except XllmError as error:
            _log_failure(self.key, error)

    async def withdraw(self) -> None:
        """End the registration; where the registry does not answer, the lease will."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        lease_id, self.lease_id = self.lease_id, 0
        if not lease_id:
            return
        try:
            await self._registry.revoke(lease_id)
        except XllmError as error:
            _log.warning("withdrawal_unanswered", key=self.key, error=error.message)

    async def _write_again(self) -> None:
        try:
            await self._registry.put(self.key, self._value(), self.lease_id)
        except FencedError:
            await self._register()
        self._is_stale = False

    async def _register(self) -> None:
        sent_at = self._clock()
        lease = await self._registry.grant(self._ttl_s)
        await self._registry.put(self.key, self._value(), lease.id)
        self.lease_id = lease.id
        self._expires_at = sent_at + lease.ttl_s
        self._looked_at = sent_at
        self._degraded = False
        self._is_stale = False
        self.num_registrations += 1

    async def _renew(self) -> None:
        sent_at = self._clock()
        remaining_s = await self._registry.keep_alive(self.lease_id)
        if remaining_s > 0:
            self._expires_at = sent_at + remaining_s
            if sent_at - self._looked_at >= _LOOK_S:
                await self._look(sent_at)
            if self._is_stale:
                await self._write_again()
            self._degraded = False
            return
        _log.warning("lease_lost", key=self.key)
        if self._degraded:
            await asyncio.sleep(_JITTER_S * self._spread())
        await self._register()

    async def _look(self, now: float) -> None:
        entry = await self._registry.get(self.key)
        self._looked_at = now
        if entry is None:
            _log.warning("entry_lost", key=self.key)
            self._is_stale = True
            return
        rival = 0 if entry.lease_id == self.lease_id else entry.lease_id
        if rival and rival != self._rival_lease:
            hint = "another process has this name: end one of them, or give it another name"
            _log.error("name_taken", key=self.key, lease_id=rival, hint=hint)
        self._rival_lease = rival

    async def _keep(self) -> None:
        pause_s = _MIN_PAUSE_S
        while True:
            half = min((self._expires_at - self._clock()) / 2, _RENEWAL_S)
            await asyncio.sleep(pause_s if self._degraded else max(half, _MIN_PAUSE_S))
            try:
                await self._renew()
                pause_s = _MIN_PAUSE_S
            except Exception as error:  # whatever it is: without renewals nobody finds us
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
                if not self._degraded:
                    _log_failure(self.key, error)
                self._degraded = True


def _log_failure(key: str, error: Exception) -> None:
    if isinstance(error, TransportError | FencedError | OverloadedError):
        _log.warning("registry_unreachable", key=key, error=error.message)
    else:
        text = error.message if isinstance(error, XllmError) else describe_error(error)
        _log.error("renewal_failed", key=key, error=text)
