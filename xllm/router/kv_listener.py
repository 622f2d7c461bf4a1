"""The index's shell: what the membership says goes to the feed, and questions go out.

Instances are asked over the connection that requests take; a daemon gets one of its own when it is
first asked, since routers send it nothing else.
"""

from __future__ import annotations

import functools

import structlog

from xllm.errors import TransportError, XllmError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage, SnapshotOfBlocks
from xllm.protocol.cache import CacheRefused
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import QuerySnapshot
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.router.buses import key_for
from xllm.router.kv_feed import KvFeed
from xllm.router.membership import Membership, MembershipListener

_log = structlog.get_logger("kv_index")
DaemonAnswer = SnapshotOfBlocks | CacheRefused


class KvListener(MembershipListener):
    """Lives in the router's loop; `tick` several times a second."""

    def __init__(self, transport: Transport, membership: Membership, feed: KvFeed) -> None:
        self._transport = transport
        self._membership = membership
        self._feed = feed
        self._daemons: dict[str, DaemonRecord] = {}
        self._sockets: dict[str, DealerSocket[DaemonAnswer]] = {}
        self._decoder: Decoder[DaemonAnswer] = Decoder(DaemonAnswer)
        membership.listeners.append(self)
        take = functools.partial(feed.snapshot, PeerRole.MASTER)
        membership.answers(SnapshotOfBlocks, take)

    def instance_registered(self, record: InstanceRecord) -> None:
        """See MembershipListener."""
        self._feed.instance_registered(record)

    def instance_gone(self, name: str) -> None:
        """See MembershipListener."""
        self._feed.gone(PeerRole.MASTER, name)

    def publisher_registered(self, record: DaemonRecord | RouterRecord) -> None:
        """See MembershipListener."""
        if not isinstance(record, DaemonRecord):
            return
        known = self._daemons.get(record.name)
        if known is None or known.incarnation != record.incarnation:
            self._close(record.name)
        self._daemons[record.name] = record
        self._feed.daemon_registered(record)

    def publisher_gone(self, role: PeerRole, name: str) -> None:
        """See MembershipListener."""
        if role is PeerRole.DAEMON and self._daemons.pop(name, None) is not None:
            self._feed.gone(role, name)
            self._close(name)

    def heard(self, message: BusMessage) -> None:
        """See MembershipListener."""
        self._feed.heard(message)

    def tick(self) -> None:
        """Ask whom the feed wants to ask."""
        for publisher in list(self._feed.to_ask()):
            self._feed.asked(publisher, self._ask(*publisher))

    def close(self) -> None:
        """Close the connections to daemons."""
        for name in tuple(self._sockets):
            self._close(name)

    def _ask(self, role: PeerRole, name: str) -> bool:
        question = QuerySnapshot(self._feed.followers[role, name].seq)
        if role is PeerRole.MASTER:
            return self._membership.send(name, question)
        socket = self._sockets.get(name) or self._open(self._daemons[name])
        if socket is None or not socket.connected:
            return False
        try:
            socket.send(question)
        except TransportError as error:
            _log.warning("daemon_send_failed", daemon=name, error=error.message)
            return False
        return True

    def _open(self, record: DaemonRecord) -> DealerSocket[DaemonAnswer] | None:
        name = record.name
        try:
            socket = DealerSocket(
                self._transport,
                record.endpoint,
                self._decoder,
                functools.partial(self._daemon_says, name),
                server_key=key_for(record.endpoint, record.public_key),
                server_role=PeerRole.DAEMON,
                name=f"daemon {name}",
            )
        except XllmError as error:
            _log.error("daemon_unreachable", daemon=name, error=error.message)
            return None
        self._sockets[name] = socket
        return socket

    def _daemon_says(self, name: str, message: DaemonAnswer, frames: list[bytes]) -> None:
        if isinstance(message, SnapshotOfBlocks):
            self._feed.snapshot(PeerRole.DAEMON, name, message)
        else:
            _log.warning("daemon_refused", daemon=name, error=message.message)

    def _close(self, name: str) -> None:
        socket = self._sockets.pop(name, None)
        if socket is not None:
            socket.close()
