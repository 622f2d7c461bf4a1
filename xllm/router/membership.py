"""Who is in the cluster: what is watched and heard goes to the view, what changed to the service.

The registry's records of instances, daemons and routers open and close the links to them. It
decides nothing; other parts of the router listen (`listeners`), or take an instance's answers of
one kind (`answers`). Who speaks another version of the protocol is named in health reports and left
alone. Invariant: there is a link for each instance of the view, and for no other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import BadMessageError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, InstanceRequest, TokenBatch
from xllm.protocol.message import OLDEST_PROTOCOL, PROTOCOL_VERSION, speaks
from xllm.protocol.records import (
    DaemonRecord,
    InstanceRecord,
    RouterRecord,
    daemon_key,
    instance_key,
    router_key,
)
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.waiting import wait_registry
from xllm.protocol.registry_wire import Change
from xllm.protocol.transport.context import Transport
from xllm.router.links import SocketLinks
from xllm.router.service import RouterService
from xllm.router.view import ViewChange

_log = structlog.get_logger("router")

R = TypeVar("R")
N = TypeVar("N", bound=InstanceRecord | DaemonRecord | RouterRecord)
P = TypeVar("P", DaemonRecord, RouterRecord)


class MembershipListener:
    """What a part of the router may want to hear; override what it needs. Called in the loop,
    after the view knows; must not raise."""

    def instance_registered(self, record: InstanceRecord) -> None:
        """An instance, or another incarnation of it, is registered; its link is being opened."""

    def instance_connected(self, name: str) -> None:
        """The connection to an instance stands: it can be asked."""

    def instance_gone(self, name: str) -> None:
        """The view forgot an instance: its link is closed."""

    def publisher_registered(self, record: DaemonRecord | RouterRecord) -> None:
        """A daemon or another router is registered, or wrote its record anew."""

    def publisher_gone(self, role: PeerRole, name: str) -> None:
        """The record of a daemon or another router (`role`) is gone."""

    def heard(self, message: BusMessage) -> None:
        """A word on a publisher's bus."""


class Membership:
    """The cluster as one router watches it. `name`: of that router, whose own record it skips."""

    def __init__(self, name: str, transport: Transport, service: RouterService) -> None:
        self.listeners: list[MembershipListener] = []
        self._name = name
        self._service = service
        self._answers: dict[type[Any], Callable[[str, Any], None]] = {}
        self._not_understood: dict[str, int] = {}
        """Versions of the protocol that are not spoken here, by the keys of those who do."""
        service.complaints.append(self.complaints)
        self._links = SocketLinks(
            transport, self._instance_says, self._connected, self._disconnected, self._heard
        )
        self._instances: Decoder[InstanceRecord] = Decoder(InstanceRecord)
        self._daemons: Decoder[DaemonRecord] = Decoder(DaemonRecord)
        self._routers: Decoder[RouterRecord] = Decoder(RouterRecord)

    async def join(self, registry: Registry, cluster: ClusterSettings) -> None:
        """Watch the cluster from now on; what is registered is known when this returns."""
        self._links.buses.lease_s = cluster.lease_s
        for prefix, changed in (
            (instance_key(cluster.name, ""), self._instances_changed),
            (daemon_key(cluster.name, ""), self._daemons_changed),
            (router_key(cluster.name, ""), self._routers_changed),
        ):
            watch = functools.partial(registry.watch, prefix, changed, patient=True)
            await wait_registry(cluster, watch)

    def answers(self, kind: type[R], take: Callable[[str, R], None]) -> None:
        """`take(instance, message)` gets all answers of that type, in place of the service."""
        self._answers[kind] = take

    def send(self, instance: str, message: InstanceRequest) -> bool:
        """Send or queue; False where the instance cannot be reached."""
        return self._links.send(instance, message)

    def changed(self, change: ViewChange) -> None:
        """The view changed: requests move, links of forgotten instances close."""
        self._service.dispatcher.changed(change)
        if change.lost:
            for name in self._links.names:
                if self._service.view.get(name) is None:
                    self._links.close(name)
                    for one in self.listeners:
                        one.instance_gone(name)

    def reconnect(self, name: str) -> None:
        """Give up an instance's connection, which carries nothing, for a new one: what runs there
        is lost to this router, though nobody died of it."""
        known = self._service.view.get(name)
        if known is None:
            return
        _log.warning("instance_unanswering", instance=name)
        change = self._service.view.disconnected(name)
        self._links.open(known.record)
        self.changed(dataclasses.replace(change, left=change.lost))

    def complaints(self) -> tuple[str, ...]:
        """Who cannot be understood, and who speaks as another, for health reports."""
        ours = f"{OLDEST_PROTOCOL} to {PROTOCOL_VERSION}"
        not_understood = tuple(
            f"{_described(key)} speaks version {version} of the protocol, not {ours}"
            for key, version in sorted(self._not_understood.items())
        )
        return not_understood + self._links.buses.complaints()

    def tick(self) -> None:
        """Several times a second."""
        self._links.buses.tick(is_registry_silent=self._service.registry_degraded)

    def close(self) -> None:
        """Close every link."""
        self._links.close_all()

    # -- what happens ------------------------------------------------------------------------

    def _instance_says(self, name: str, message: InstanceReply) -> None:
        if not isinstance(message, TokenBatch):
            take = self._answers.get(type(message))
            if take is not None:
                take(name, message)
                return
        self._service.instance_says(name, message)

    def _connected(self, name: str) -> None:
        self.changed(self._service.view.connected(name))
        for one in self.listeners:
            one.instance_connected(name)

    def _disconnected(self, name: str) -> None:
        self.changed(self._service.view.disconnected(name))

    def _heard(self, message: BusMessage) -> None:
        self.changed(self._service.heard(message))
        for one in self.listeners:
            one.heard(message)

    def _instances_changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            name = change.key.rpartition("/")[2]
            record = self._understood(self._instances, change)
            if record is None:
                replaced = change.key in self._not_understood
                if change.entry is None or replaced:
                    self.changed(self._service.view.deregistered(name, replaced=replaced))
                continue
            known = self._service.view.get(name)
            self.changed(self._service.registered(record))
            if known is None or known.record.incarnation != record.incarnation:
                for one in self.listeners:
                    one.instance_registered(record)
                self._links.open(record)

    def _daemons_changed(self, changes: Sequence[Change]) -> None:
        self._publishers_changed(changes, self._daemons, PeerRole.DAEMON)

    def _routers_changed(self, changes: Sequence[Change]) -> None:
        others = [one for one in changes if one.key.rpartition("/")[2] != self._name]
        self._publishers_changed(others, self._routers, PeerRole.ROUTER)

    def _publishers_changed(
        self, changes: Sequence[Change], decoder: Decoder[P], role: PeerRole
    ) -> None:
        """Those that are only heard: never sent to."""
        for change in changes:
            name = change.key.rpartition("/")[2]
            record = self._understood(decoder, change)
            if record is not None:
                self._links.buses.hear(record)
                for one in self.listeners:
                    one.publisher_registered(record)
            elif change.entry is None or change.key in self._not_understood:
                self._service.view.publisher_gone(role, name)
                self._links.buses.unhear(role, name)
                for one in self.listeners:
                    one.publisher_gone(role, name)

    def _understood(self, decoder: Decoder[N], change: Change) -> N | None:
        """The record that was written. None: it is gone, is none, or is that of one who speaks a
        version of the protocol that is not spoken here."""
        self._not_understood.pop(change.key, None)
        if change.entry is None:
            return None
        record = _read(decoder, change.key, change.entry.value)
        if record is None or speaks(record.protocol):
            return record
        self._not_understood[change.key] = record.protocol
        _log.error("protocol_unsupported", key=change.key, version=record.protocol)
        return None


def _described(key: str) -> str:
    """instance NAME, daemon NAME or router NAME."""
    kind, _, name = key.rpartition("/")
    return f"{kind.rpartition('/')[2].removesuffix('s')} {name}"


def _read(decoder: Decoder[N], key: str, value: bytes) -> N | None:
    """The record of a key. None: it is none, or speaks for somebody else than who owns the key."""
    try:
        record = decoder.decode(value)
    except BadMessageError as error:
        _log.error("bad_record", key=key, error=error.message)
        return None
    if record.name != key.rpartition("/")[2]:
        _log.error("bad_record", key=key, error=f"it names {record.name[:200]!r}")
        return None
    return record
