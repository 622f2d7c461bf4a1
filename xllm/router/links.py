"""The router's connections: one DEALER to each instance, and one subscriber for all buses.

Knows sockets and records, not requests. Words for an instance that is not connected are not
queued: they would reach a process that never heard of their request.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from xllm.errors import TransportError, XllmError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, InstanceRequest
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import SubscriberSocket

_log = structlog.get_logger("router")


class SocketLinks:
    """InstanceLinks over sockets. `on_word(name, message)`, `on_connected(name)`,
    `on_gone(name)`, `on_bus(message)` tell what happens."""

    def __init__(
        self,
        transport: Transport,
        on_word: Callable[[str, InstanceReply], None],
        on_connected: Callable[[str], None],
        on_gone: Callable[[str], None],
        on_bus: Callable[[BusMessage], None],
    ) -> None:
        self._transport = transport
        self._on_word = on_word
        self._on_connected = on_connected
        self._on_gone = on_gone
        self._on_bus = on_bus
        self._decoder: Decoder[InstanceReply] = Decoder(InstanceReply)
        self._sockets: dict[str, DealerSocket[InstanceReply]] = {}
        self._buses: dict[str, str] = {}
        """Bus endpoint by publisher."""
        self._bus: SubscriberSocket[BusMessage] = SubscriberSocket(
            transport, Decoder(BusMessage), self._hear_word
        )

    def __contains__(self, name: str) -> bool:
        return name in self._sockets

    @property
    def names(self) -> tuple[str, ...]:
        """Instances that there is a socket to."""
        return tuple(self._sockets)

    def open(self, record: InstanceRecord) -> None:
        """Connect to an instance, anew if it was known."""
        name = record.name
        self.close(name)
        try:
            socket = DealerSocket(
                self._transport,
                record.endpoint,
                self._decoder,
                lambda message, frames: self._on_word(name, message),
                on_gone=lambda: self._lost(name, socket),
                on_connected=lambda: self._on_connected(name),
                server_key=key_for(record.endpoint, record.public_key),
                server_role=PeerRole.MASTER,
                name=f"instance {name}",
            )
        except XllmError as error:
            _log.error("instance_unreachable", instance=name, error=error.message)
            return
        self._sockets[name] = socket
        self.hear(record)
        if socket.connected:
            self._on_connected(name)

    def hear(self, record: InstanceRecord | DaemonRecord | RouterRecord) -> None:
        """Listen to a publisher's heartbeats."""
        if self._buses.get(record.name) == record.bus_endpoint or not record.bus_endpoint:
            return
        self.unhear(record.name)
        key = key_for(record.bus_endpoint, record.public_key)
        try:
            self._bus.connect(record.bus_endpoint, key, _role_of(record))
        except XllmError as error:
            _log.error("bus_unreachable", publisher=record.name, error=error.message)
            return
        self._buses[record.name] = record.bus_endpoint

    def unhear(self, name: str) -> None:
        """Stop listening to a publisher."""
        endpoint = self._buses.pop(name, None)
        if endpoint is not None and endpoint not in self._buses.values():
            self._bus.disconnect(endpoint)

    def send(self, instance: str, message: InstanceRequest) -> bool:
        """Send or queue; False where the instance cannot be reached."""
        socket = self._sockets.get(instance)
        if socket is None or not socket.connected:
            return False
        try:
            socket.send(message)
        except TransportError as error:
            _log.warning("instance_send_failed", instance=instance, error=error.message)
            return False
        return True

    def close(self, name: str) -> None:
        """Give up an instance. Unknown ones are ignored."""
        socket = self._sockets.pop(name, None)
        if socket is not None:
            socket.close()
            self.unhear(name)

    def close_all(self) -> None:
        """Close every socket."""
        for name in self.names:
            self.close(name)
        self._bus.close()

    def _hear_word(self, topic: bytes, message: BusMessage) -> None:
        if message.publisher in self._buses:  # else its last words came after its record's end
            self._on_bus(message)

    def _lost(self, name: str, socket: DealerSocket[InstanceReply]) -> None:
        if self._sockets.get(name) is socket:
            socket.discard_queued()
            self._on_gone(name)


def _role_of(record: InstanceRecord | DaemonRecord | RouterRecord) -> PeerRole:
    """What the key of a record's owner must be admitted as."""
    if isinstance(record, InstanceRecord):
        return PeerRole.MASTER
    return PeerRole.DAEMON if isinstance(record, DaemonRecord) else PeerRole.ROUTER


def key_for(endpoint: str, public_key: str) -> str:
    """Keys are for TCP; ipc is guarded by its directory."""
    return public_key if endpoint.startswith("tcp://") else ""
