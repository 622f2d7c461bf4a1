"""The router's connections: one DEALER to each instance, and the buses of all publishers.

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
from xllm.protocol.records import InstanceRecord
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.router.buses import PublisherBuses, key_for

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
        self._decoder: Decoder[InstanceReply] = Decoder(InstanceReply)
        self._sockets: dict[str, DealerSocket[InstanceReply]] = {}
        self.buses = PublisherBuses(transport, on_bus)

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
        self.buses.hear(record)
        if socket.connected:
            self._on_connected(name)

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
            self.buses.unhear(PeerRole.MASTER, name)

    def close_all(self) -> None:
        """Close every socket."""
        for name in self.names:
            self.close(name)
        self.buses.close()

    def _lost(self, name: str, socket: DealerSocket[InstanceReply]) -> None:
        if self._sockets.get(name) is socket:
            socket.discard_queued()
            self._on_gone(name)
