"""The leader's duties while it leads: roles are told, loads are mirrored into the registry.

A shell around `roles` and `mirror`: `tick` runs each heartbeat, writes go out once a second, in one
guarded transaction. Invariant: nothing is sent or written unless the candidate says, just before,
that it leads; and what is written only takes effect while the registry agrees (an amendment: while
the key is what was amended).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from xllm.errors import InvalidRequestError, UnavailableError, XllmError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import DaemonHeartbeat, InstanceHeartbeat
from xllm.protocol.instance import AssignRole
from xllm.protocol.records import cluster_prefix, era_key, leader_key, roles_key, slo_key
from xllm.protocol.registry.interface import MAX_GUARDED_WRITES, Registry
from xllm.router.leadership.candidate import Candidate
from xllm.router.leadership.mirror import MIRRORED, Mirror
from xllm.router.leadership.objectives import (
    ServiceObjectives,
    read_objectives,
    restore_objectives,
)
from xllm.router.leadership.roles import RoleTable, restore_rows
from xllm.router.leadership.standing import Remembered
from xllm.router.view import ClusterView

_log = structlog.get_logger("leadership")

WRITE_PERIOD_S = 1.0
ASSIGN_S = 5.0
"""How long the registry gets to take what an operator waits for."""
MAX_AMENDMENTS = 8
"""Others who may write a key between its reading and its writing, one after the other."""
LEADS_NO_MORE = "this router does not lead any more: ask again"

Amendment = Callable[[bytes | None], bytes | None]


class Office:
    """What one router does whenever it leads. `send(instance, message)`: whether it could be
    reached; `spawn` runs a coroutine."""

    def __init__(
        self,
        registry: Registry,
        cluster: str,
        candidate: Candidate,
        view: ClusterView,
        send: Callable[[str, AssignRole], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
    ) -> None:
        self.roles = RoleTable()
        self.mirror = Mirror(cluster)
        self.num_writes = 0
        self._registry = registry
        self._cluster = cluster
        self._candidate = candidate
        self._view = view
        self._send = send
        self._spawn = spawn
        self._era = ""
        self._objectives = ServiceObjectives()
        """As the registry has them."""
        self._epoch = 0
        """For which the table and the mirrored keys were read; 0: none."""
        self._is_busy = False
        self._worked = asyncio.Event()
        """Set, and replaced by the next, whenever work with the registry ended."""
        self._wrote_at = 0.0
        self._is_failing = False

    def heard(self, word: InstanceHeartbeat | DaemonHeartbeat) -> None:
        """An instance or a daemon speaks. Every router keeps its last word, to know it once it
        leads."""
        self.mirror.heard(word)

    def instance_gone(self, name: str) -> None:
        """An instance left."""
        self.roles.gone(name)
        self.mirror.gone(PeerRole.MASTER, name)

    def daemon_gone(self, name: str) -> None:
        """A daemon left."""
        self.mirror.gone(PeerRole.DAEMON, name)

    def tick(self, now: float) -> None:
        """Each heartbeat."""
        epoch = self._candidate.epoch
        if not epoch:
            self._epoch = 0
            return
        if self._epoch == epoch:
            for one in self._view:
                if not one.leaving:
                    self.roles.registered(one.name)
            self._tell_roles(epoch, now)
            self._remember()
        if not self._is_busy and (
            self._epoch != epoch or self.roles.is_changed or now >= self._wrote_at + WRITE_PERIOD_S
        ):
            self._is_busy = True
            self._wrote_at = now
            self._spawn(self._work(epoch, now))

    def _remember(self) -> None:
        """As said to the other routers, one of which may lead when the registry has lost it all."""
        now = self._objectives
        self._view.standing.remembered = Remembered(
            self._era, self.roles.rows, now.ttft_ms, now.tpot_ms
        )

    def objectives_changed(self, objectives: ServiceObjectives | None) -> None:
        """`slo` says that, or (None) is gone: deleted, unless the era went, too."""
        if not self._epoch:
            return
        if objectives is not None:
            self._objectives = objectives
        else:
            self._spawn(self._objectives_gone(self._era))

    async def _objectives_gone(self, era: str) -> None:
        try:
            entry = await self._registry.get(era_key(self._cluster))
            slo = await self._registry.get(slo_key(self._cluster))
        except XllmError as error:
            _log.warning("leader_read_failed", error=error.message)
            return
        if slo is None and entry is not None and entry.value == era.encode() == self._era.encode():
            self._objectives = ServiceObjectives()

    async def wait_read(self) -> None:
        """Return once this router has read what the leader before has left: only then is what an
        operator says added to it. UnavailableError: this router leads no more, or the registry has
        not answered in time."""
        late = "this router has only just begun to lead, and the registry has not answered it yet"
        epoch = self._candidate.epoch
        await self._wait_worked(epoch, lambda: self._epoch == epoch, late)

    async def assign(self, instance: str, role: str, now: float) -> None:
        """Give an instance a role, behind `wait_read`: returns when the registry has it.
        InvalidRequestError naming the bound; UnavailableError: this router leads no more, or the
        registry has not taken it yet (it is tried on)."""
        epoch = self._epoch
        if not epoch or self._candidate.epoch != epoch:
            raise UnavailableError(LEADS_NO_MORE)
        self.roles.assign(instance, role)
        self.tick(now)
        late = "the registry has not taken the role yet"
        await self._wait_worked(epoch, lambda: not self.roles.is_changed, late)

    async def _wait_worked(self, epoch: int, is_done: Callable[[], bool], late: str) -> None:
        """Until work with the registry has made `is_done()` true. UnavailableError: this router
        does not lead under that epoch any more; or, saying `late`, it took too long."""
        try:
            async with asyncio.timeout(ASSIGN_S):
                while True:
                    if not epoch or self._candidate.epoch != epoch:
                        raise UnavailableError(LEADS_NO_MORE)
                    if is_done():
                        return
                    await self._worked.wait()
        except TimeoutError:
            raise UnavailableError(late) from None

    async def amend(self, key: str, change: Amendment) -> bytes | None:
        """Write what `change` makes of a key's value (None: no key), and nothing that others write
        meanwhile is lost; returns it. UnavailableError: this process leads no more, others write
        all the time, or the registry has not answered in time (whether it takes the last writing is
        not known then); XllmError of `change`, or of the registry.

        Not guarded by the leader key: it takes effect only if nobody, so no later leader either,
        has written the key since it was read."""
        try:
            async with asyncio.timeout(ASSIGN_S):
                return await self._amend(key, change)
        except TimeoutError:
            raise UnavailableError("the registry has not taken the change yet") from None

    async def _amend(self, key: str, change: Amendment) -> bytes | None:
        for _ in range(MAX_AMENDMENTS):
            entry = await self._registry.get(key)
            before = None if entry is None else entry.value
            value = change(before)
            if value is None or value == before:
                return before
            if not self._candidate.epoch:
                raise UnavailableError(LEADS_NO_MORE)
            revision = 0 if entry is None else entry.mod_revision
            if (await self._registry.compare_and_set(key, revision, value)).ok:
                return value
        raise UnavailableError(f"others write {key} all the time: ask again")

    def _tell_roles(self, epoch: int, now: float) -> None:
        reachable = [
            (one.name, one.record.incarnation, one.role) for one in self._view if one.connected
        ]
        for name, role in self.roles.due(reachable, now):
            one = self._view.get(name)
            if one is not None and self._send(name, AssignRole(role, epoch)):
                self.roles.told(name, one.record.incarnation, role, now)

    async def _work(self, epoch: int, now: float) -> None:
        """Read what the leader before has left, once; then write what changed."""
        try:
            if self._epoch != epoch:
                await self._read(epoch)
            else:
                await self._write(epoch, now)
            self._is_failing = False
        except XllmError as error:
            if not self._is_failing:
                _log.warning("leader_write_failed", epoch=epoch, error=error.message)
            self._is_failing = True
        finally:
            self._is_busy = False
            worked, self._worked = self._worked, asyncio.Event()
            worked.set()

    async def _find_era(self) -> str:
        """The era of what the registry holds: a new one where it holds none."""
        key = era_key(self._cluster)
        entry = await self._registry.get(key)
        while entry is None:
            entry = (await self._registry.compare_and_set(key, 0, uuid.uuid4().hex.encode())).entry
        return entry.value.decode(errors="replace")

    async def _find_objectives(self, lost: Remembered) -> ServiceObjectives:
        """What `slo` says; where it is missing, it is written as `lost` has it."""
        kept = ServiceObjectives(lost.ttft_ms, lost.tpot_ms)
        value = await self._amend(slo_key(self._cluster), lambda now: restore_objectives(now, kept))
        try:
            return read_objectives(value)
        except InvalidRequestError:
            return ServiceObjectives()  # named in the log by who watches it

    async def _read(self, epoch: int) -> None:
        standing: list[str] = []
        for kind in MIRRORED:
            listing = await self._registry.list(f"{cluster_prefix(self._cluster)}{kind}/")
            standing += [entry.key for entry in listing.entries]
        era, known = await self._find_era(), self._view.standing.remembered
        lost = known if known.is_lost(era) else Remembered()
        objectives = await self._find_objectives(lost)
        num_left_out = 0

        def restore(value: bytes | None) -> bytes | None:
            nonlocal num_left_out
            restored, num_left_out = restore_rows(value, lost.roles)
            return restored

        table = await self._amend(roles_key(self._cluster), restore)
        try:
            self.roles.begin(table or b"")
        except InvalidRequestError as error:
            _log.error("bad_role_table", error=error.message)
        self.mirror.begin(standing)
        if lost.era:
            counts = {"num_roles": len(self.roles.rows), "num_left_out": num_left_out}
            _log.warning(
                "registry_data_lost", era=era, before=lost.era, slo=str(objectives), **counts
            )
        self._era, self._objectives = era, objectives
        self._epoch = epoch
        self._remember()

    async def _write(self, epoch: int, now: float) -> None:
        puts, deletes = self.mirror.batch()
        mirrored = puts[: MAX_GUARDED_WRITES - 1 - len(deletes)] if self.roles.is_changed else puts
        table = self.roles.encode()
        roles = [(roles_key(self._cluster), table)] if self.roles.is_changed else []
        if self._candidate.epoch != epoch or not (roles or mirrored or deletes):
            return
        done = await self._registry.write_guarded(
            leader_key(self._cluster), self._candidate.revision, [*roles, *mirrored], deletes
        )
        if not done:
            self._candidate.disproved(epoch)
            return
        self.num_writes += 1
        self.mirror.wrote(mirrored, deletes, now)
        if roles:
            self.roles.written(table)
