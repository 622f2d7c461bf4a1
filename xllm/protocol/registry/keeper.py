"""Keeps a process registered: one key under one lease, for as long as the process wants.

It renews at half of what remains, counted from when the last renewal was sent, and every
`_RENEWAL_S` at least; a lease that is gone is replaced and the same key put again, after an outage
not by all at once. A key that went while its lease stands (somebody deleted it, or a write of ours
under an earlier lease came late and went with that) is put again, too. A registry that does not
answer changes nothing here (fail static): `degraded` says so, and trying goes on.

The key is written by compare-and-set, and never over the record of another process that may live
(see holder): the later of two of one name does not register, and one whose lease ended while
another took its name is told that it was replaced. Beyond that it does not know what it says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import (
    FencedError,
    NameTakenError,
    OverloadedError,
    TransportError,
    XllmError,
)
from xllm.protocol.registry.holder import NameClaim, NameState
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.waiting import wait_registry
from xllm.protocol.registry_wire import Entry
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
HELD_PAUSE_S = 0.1
"""Between looks at a name that another process has, or had."""


class Registration:
    """The record of this process under `key`, written as `value()` gives it at each write.

    `incarnation`: as the record says it. `drain_s`: how long one that ends keeps its record.
    `setting`: what gave the name, for whoever must change it. `on_replaced(reason)`: another
    process has the name by now, and this one renews no more."""

    def __init__(
        self,
        registry: Registry,
        key: str,
        value: Callable[[], bytes],
        ttl_s: float,
        *,
        incarnation: str = "",
        setting: str = "name",
        drain_s: float = 0.0,
        on_replaced: Callable[[str], None] | None = None,
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
        self._claim = NameClaim(incarnation, ttl_s, drain_s=drain_s)
        self._setting = setting
        self._on_replaced = on_replaced
        self._is_awaited = False
        self._task: asyncio.Task[None] | None = None

    @property
    def degraded(self) -> bool:
        """Whether the last renewal failed: others may not see this process before long."""
        return self._degraded

    async def attempt(self) -> bool:
        """Register, and keep it so: False while another process has the name, which may have
        ended. TransportError: the registry does not answer; NameTakenError: another living process
        has the name."""
        if not await self._register():
            return False
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"keep {self.key}")
        return True

    async def is_free(self) -> bool:
        """Whether the name could be had now; errors as of `attempt`."""
        may, _ = await self._look()
        return may

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
        if not self.lease_id:
            return  # what renews is about to register anew, as `value()` gives it then
        try:
            may, revision = await self._look()
            if may:
                self._is_stale = not await self._write(revision, self.lease_id)
        except FencedError:
            await self._register()

    async def _register(self) -> bool:
        may, revision = await self._look()
        if not may:
            return False
        sent_at = self._clock()
        lease = await self._registry.grant(self._ttl_s)
        self._claim.granted(lease.ttl_s)
        if not await self._write(revision, lease.id):
            await self._registry.revoke(lease.id)
            return False
        self.lease_id = lease.id
        self._expires_at = sent_at + lease.ttl_s
        self._looked_at = sent_at
        self._degraded = False
        self._is_stale = False
        self.num_registrations += 1
        return True

    async def _write(self, revision: int, lease_id: int) -> bool:
        """Put the record where the key still is as it was at `revision` (0: there was none)."""
        value = self._value()
        return (await self._registry.compare_and_set(self.key, revision, value, lease_id)).ok

    async def _look(self) -> tuple[bool, int]:
        """Whether the key may be written, and the revision that it has now (0: there is none)."""
        asked_at = self._clock()
        try:
            entry = await self._registry.get(self.key)
        except XllmError:
            self._claim.unanswered()
            raise
        now = self._clock()
        state = self._claim.judge(entry, self.lease_id, asked_at, now)
        if entry is not None and state is not NameState.FREE:
            self._found_held(entry, state)
        self._is_awaited = state is NameState.HELD
        self._looked_at = now
        if entry is None or entry.lease_id != self.lease_id:
            if entry is None and self.lease_id and not self._is_stale:
                _log.warning("entry_lost", key=self.key)
            self._is_stale = True
        return state is NameState.FREE, entry.mod_revision if entry is not None else 0

    def _found_held(self, entry: Entry, state: NameState) -> None:
        name, who = self.key.rpartition("/")[2], self._claim.describe_holder(entry)
        if state is NameState.TAKEN:
            raise NameTakenError(
                f"the name {name!r} is taken: {self.key} belongs to {who}, which lives. End that "
                f"process, or give this one another {self._setting}",
                param=self._setting,
            )
        if not self._is_awaited:
            _log.warning("name_awaited", key=self.key, holder=who)

    async def _renew(self) -> None:
        sent_at = self._clock()
        remaining_s = await self._registry.keep_alive(self.lease_id) if self.lease_id else 0.0
        if remaining_s > 0:
            self._expires_at = sent_at + remaining_s
            if self._is_awaited or sent_at - self._looked_at >= _LOOK_S:
                await self._look()
            if self._is_stale:
                await self._write_again()
            self._degraded = False
            return
        if self.lease_id:
            _log.warning("lease_lost", key=self.key)
            self.lease_id = 0
            if self._degraded:
                await asyncio.sleep(_JITTER_S * self._spread())
        self._degraded = not await self._register()

    async def _keep(self) -> None:
        pause_s = _MIN_PAUSE_S
        while True:
            half = min((self._expires_at - self._clock()) / 2, _RENEWAL_S)
            await asyncio.sleep(pause_s if self._degraded else max(half, _MIN_PAUSE_S))
            try:
                await self._renew()
                pause_s = _MIN_PAUSE_S
            except NameTakenError as error:
                self._replaced(error)
                return
            except Exception as error:  # whatever it is: without renewals nobody finds us
                pause_s = min(pause_s * 2, _MAX_PAUSE_S)
                if not self._degraded:
                    _log_failure(self.key, error)
                self._degraded = True

    def _replaced(self, error: NameTakenError) -> None:
        _log.error("name_taken", key=self.key, error=error.message)
        if self._on_replaced is not None:
            self._on_replaced(f"replaced while it could not renew its lease: {error.message}")


async def register(cluster: ClusterSettings, registration: Registration) -> None:
    """Start a registration, with patience for a registry that is late and for a name whose owner
    may have ended. Errors: of wait_registry, and NameTakenError."""
    await _until(lambda: wait_registry(cluster, registration.attempt))


async def wait_for_name(cluster: ClusterSettings, registration: Registration) -> None:
    """Return once the name is free; patience and errors as of `register`."""
    await _until(lambda: wait_registry(cluster, registration.is_free))


async def _until(attempt: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await attempt():
            return
        await asyncio.sleep(HELD_PAUSE_S)


def _log_failure(key: str, error: Exception) -> None:
    if isinstance(error, TransportError | FencedError | OverloadedError):
        _log.warning("registry_unreachable", key=key, error=error.message)
    else:
        text = error.message if isinstance(error, XllmError) else describe_error(error)
        _log.error("renewal_failed", key=key, error=text)
