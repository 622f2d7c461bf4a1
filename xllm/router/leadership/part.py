"""Leadership as a part of a router: it runs for leader, does a leader's duties while it leads, and
knows who leads else.

A shell that ties the candidate, the office, the live objectives and the router's view together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import BadMessageError, InvalidRequestError, TransportError, UnavailableError
from xllm.protocol.administration import ObjectivesSet, RoleSet, SetObjectives, SetRole
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage, DaemonHeartbeat, InstanceHeartbeat, RouterPresence
from xllm.protocol.client import RouterMessage
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.epochs import MAX_BASE, leader_epoch
from xllm.protocol.instance import EpochRefused
from xllm.protocol.records import (
    InstanceRecord,
    LeaderRecord,
    epoch_base_key,
    leader_key,
    slo_key,
)
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.waiting import wait_registry
from xllm.protocol.registry_wire import Change, Entry
from xllm.router.leadership.candidate import Candidate, boot_clock
from xllm.router.leadership.figures import LeadershipFigures
from xllm.router.leadership.objectives import (
    ServiceObjectives,
    amend_objectives,
    check_objectives,
    read_objectives,
)
from xllm.router.leadership.office import Office
from xllm.router.leadership.roles import check_row
from xllm.router.membership import Membership, MembershipListener
from xllm.router.service import RouterService

_log = structlog.get_logger("leadership")

ELECTION_S = 1.5
"""What an election may take after the end of the last leader's lease."""
RESIGN_S = 1.0
"""How long the registry gets to take a resignation; else the lease ends by itself."""


class Leadership(MembershipListener):
    """One router's. `record`: what its entry says where it leads; `spawn` runs a coroutine."""

    def __init__(
        self,
        record: LeaderRecord,
        cluster: ClusterSettings,
        registry: Registry,
        membership: Membership,
        service: RouterService,
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._record = record
        self._cluster = cluster
        self._registry = registry
        self._service = service
        self._clock = clock
        self._standing = service.view.standing
        self._decoder: Decoder[LeaderRecord] = Decoder(LeaderRecord)
        self._entry: Entry | None = None
        self._was_epoch = 0
        self._has_resigned = False
        self._out_of_range: set[tuple[str, str]] = set()
        """Whose epochs were named in the log, and of which field."""
        self._led_at = clock()
        self._candidate = Candidate(
            registry,
            leader_key(cluster.name),
            epoch_base_key(cluster.name),
            lambda base: encode(msgspec.structs.replace(record, epoch_base=base)),
            cluster.lease_s,
            self._changed,
            spawn,
            clock,
        )
        self.office = Office(
            registry, cluster.name, self._candidate, service.view, membership.send, spawn
        )
        self.figures = LeadershipFigures(
            service.registry, self._standing, self.office, lambda: self.epoch
        )
        membership.listeners.append(self)
        membership.answers(EpochRefused, self._refused)
        service.complaints.append(self.complaints)
        service.leader_command = self.command

    @property
    def epoch(self) -> int:
        """The epoch while this router leads for certain, else 0."""
        return self._candidate.epoch

    @property
    def roles(self) -> tuple[tuple[str, str], ...]:
        """The role table, while this router leads."""
        return self.office.roles.rows if self.epoch else ()

    def say(self, word: RouterPresence) -> RouterPresence:
        """The word with what this router says of its leadership."""
        word = msgspec.structs.replace(word, highest_epoch=self._standing.epoch)
        if not self.epoch:
            return word
        known = self._standing.remembered
        return msgspec.structs.replace(
            word,
            leader_epoch=self.epoch,
            roles=known.roles if known.era else self.roles,
            era=known.era,
            ttft_ms=known.ttft_ms,
            tpot_ms=known.tpot_ms,
        )

    async def start(self) -> None:
        """Watch the live objectives, and run for leader. Patiently: objectives that a registry
        lost stay in force until the next leader has written them back."""
        key = slo_key(self._cluster.name)
        watch_slo = partial(self._registry.watch, key, self._slo_changed, patient=True)
        await wait_registry(self._cluster, watch_slo)
        await wait_registry(self._cluster, self._candidate.start)

    def tick(self) -> None:
        """Each heartbeat."""
        now = self._clock()
        self._candidate.tick()
        self._candidate.outbid(self._standing.epoch)
        if self._standing.leader:
            self._led_at = now
        self.office.tick(now)

    async def resign(self) -> None:
        """Let another lead at once; returns when the registry knows, or does not answer."""
        self._has_resigned = True
        try:
            async with asyncio.timeout(RESIGN_S):
                await self._candidate.resign()
        except TimeoutError:
            _log.warning("resignation_unanswered")

    def close(self) -> None:
        """Run no more; a lease that stands is left to lapse."""
        self._candidate.close()

    async def command(self, message: SetRole | SetObjectives) -> RouterMessage:
        """Carry out an operator's wish, or say what is in force. UnavailableError, saying who
        leads, where this router does not, or that the registry does not answer; InvalidRequestError
        naming the bound."""
        if isinstance(message, SetRole):
            check_row(message.instance, message.role)
        else:
            check_objectives(ServiceObjectives(message.ttft_ms or 0, message.tpot_ms or 0))
        if isinstance(message, SetObjectives) and _asks_only(message):
            now = self._service.objectives.now
            return ObjectivesSet(id=message.id, ttft_ms=now.ttft_ms, tpot_ms=now.tpot_ms)
        if not self.epoch:
            raise UnavailableError(f"this router does not lead; {self._standing.describe()}")
        await self.office.wait_read()
        if isinstance(message, SetObjectives):
            return await self._set_objectives(message)
        return await self._set_role(message)

    async def _set_role(self, message: SetRole) -> RoleSet:
        if self._service.view.get(message.instance) is None:
            raise InvalidRequestError(
                f"no instance {message.instance!r} is there", param="instance"
            )
        await self.office.assign(message.instance, message.role, self._clock())
        return RoleSet(id=message.id, instance=message.instance, role=message.role)

    async def _set_objectives(self, message: SetObjectives) -> ObjectivesSet:
        change = partial(amend_objectives, ttft_ms=message.ttft_ms, tpot_ms=message.tpot_ms)
        try:
            value = await self.office.amend(slo_key(self._cluster.name), change)
        except TransportError as error:
            raise UnavailableError(f"the registry does not answer: {error.message}") from error
        now = read_objectives(value)
        return ObjectivesSet(id=message.id, ttft_ms=now.ttft_ms, tpot_ms=now.tpot_ms)

    def complaints(self) -> tuple[str, ...]:
        """What is amiss, for health reports."""
        silent_s = self._clock() - self._led_at
        if self._standing.leader or silent_s < self._cluster.lease_s + ELECTION_S:
            return ()
        return ("no router leads the cluster",)

    # -- MembershipListener --------------------------------------------------------------------

    def instance_registered(self, record: InstanceRecord) -> None:
        """Another incarnation was told nothing yet."""
        self.office.roles.forgot(record.name)

    def instance_connected(self, name: str) -> None:
        """What was sent over the connection before may be lost."""
        self.office.roles.forgot(name)

    def instance_gone(self, name: str) -> None:
        """Nothing is kept of it, and nothing mirrored."""
        self.office.instance_gone(name)
        self._out_of_range.discard((name, "EpochRefused.highest"))

    def publisher_gone(self, role: PeerRole, name: str) -> None:
        """A daemon left, or another router, of which nothing is kept."""
        if role is PeerRole.DAEMON:
            self.office.daemon_gone(name)
        self._out_of_range -= {(name, "highest_epoch"), (name, "leader_epoch")}

    def heard(self, message: BusMessage) -> None:
        """Loads are kept; a higher epoch ends a lower one."""
        if isinstance(message, InstanceHeartbeat | DaemonHeartbeat):
            self.office.heard(message)
        elif isinstance(message, RouterPresence):
            self._candidate.outbid(self._standing.epoch)
            # Above that a word is believed of the registry alone: this one unseats nobody.
            if 0 < message.leader_epoch <= MAX_BASE:
                self._candidate.led(message.leader_epoch)
            self._name_epoch(message.publisher, "highest_epoch", message.highest_epoch)
            self._name_epoch(message.publisher, "leader_epoch", message.leader_epoch)

    # -- what happens --------------------------------------------------------------------------

    def _changed(self) -> None:
        """This router begins or ceases to lead, or the leader key changed."""
        entry = self._candidate.entry
        if entry is not self._entry:
            self._entry = entry
            self._name_leader(entry)
        epoch = self._candidate.epoch
        if epoch != self._was_epoch:
            if epoch:
                self.figures.num_terms += 1
                _log.info("leadership_begins", epoch=epoch)
                self._standing.elected(self._record.name, epoch, self._record.zmq_endpoint)
            else:
                log = _log.info if self._has_resigned else _log.warning
                log("leadership_ends", epoch=self._was_epoch)
                if self._standing.leader == self._record.name:
                    self._standing.vacant()
            self._was_epoch = epoch

    def _name_leader(self, entry: Entry | None) -> None:
        if entry is None:
            self._standing.vacant()
            return
        try:
            record = self._decoder.decode(entry.value)
            epoch = leader_epoch(record, entry.create_revision)
        except (BadMessageError, InvalidRequestError) as error:
            _log.error("bad_record", key=entry.key, error=error.message)
            return
        self._standing.elected(record.name, epoch, record.zmq_endpoint)

    def _refused(self, instance: str, word: EpochRefused) -> None:
        """An instance knows a higher epoch than a command of ours had."""
        self.figures.num_refused += 1
        _log.warning("epoch_refused", instance=instance, epoch=word.epoch, highest=word.highest)
        if self._standing.learned(word.highest):
            self._candidate.outbid(self._standing.epoch)
        else:
            self._name_epoch(instance, "EpochRefused.highest", word.highest)

    def _name_epoch(self, name: str, field: str, epoch: int) -> None:
        """Say in the log, once for each that it comes from, that an epoch is ignored."""
        if self._standing.is_out_of_range(epoch) and (name, field) not in self._out_of_range:
            self._out_of_range.add((name, field))
            _log.error("epoch_out_of_range", of=name, field=field, epoch=epoch, most=MAX_BASE)

    def _slo_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key != slo_key(self._cluster.name):
                continue
            value = change.entry.value if change.entry is not None else None
            objectives = self._service.objectives
            try:
                objectives.changed(value)
            except InvalidRequestError as error:
                _log.error("bad_slo", error=error.message, kept=str(objectives.now))
            else:
                self.office.objectives_changed(None if value is None else objectives.now)
                _log.info("slo_changed", slo=str(objectives.now))


def _asks_only(message: SetObjectives) -> bool:
    return message.ttft_ms is None and message.tpot_ms is None
