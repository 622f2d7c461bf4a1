"""Publishing and subscribing: the topic is the first frame, the message the second.

A publisher drops what a slow subscriber does not read, without a word: receivers find gaps by
the messages' own sequence numbers and ask for a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import structlog
import zmq

from xllm.errors import BadMessageError, XllmError
from xllm.protocol.authority import PeerRole, Subscribe, may_say
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.allow_list import CLUSTER_DOMAIN
from xllm.protocol.transport.channel import Channel
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits, connection_limit
from xllm.protocol.transport.monitor import (
    ACCEPTED,
    DISCONNECTED,
    REFUSED,
    REFUSED_PAUSE_S,
    ConnectionMonitor,
)
from xllm.protocol.transport.peers import AcceptedConnections

_log = structlog.get_logger("transport")
T = TypeVar("T")
MAX_TOPIC_BYTES = 256
_NOBLOCK = zmq.NOBLOCK
_SUBSCRIBES = b"\x01"
_UNSUBSCRIBES = b"\x00"


class PublisherSocket(Channel):
    """Binds `endpoint` and publishes to everybody who subscribed, and may where keys are
    demanded."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        *,
        limits: SocketLimits | None = None,
        name: str = "",
    ) -> None:
        self._has_keys = endpoint.startswith("tcp://") and transport.security is not None
        # An XPUB tells who subscribes, and waits for our word on each.
        kind = zmq.XPUB if self._has_keys else zmq.PUB
        super().__init__(transport, kind, limits or SocketLimits(), name or endpoint)
        self._connections = AcceptedConnections(self.name, connection_limit(self._limits))
        self._monitor: ConnectionMonitor | None = None
        if self._has_keys:
            self._socket.setsockopt(zmq.XPUB_MANUAL, 1)
            self._monitor = self._watch(self._connection_event)
        self.endpoint = self._bind(endpoint)
        if self._has_keys:
            transport.watch_keys(self)

    def publish(self, topic: bytes, message: msgspec.Struct) -> None:
        """Send to the topic's subscribers, as far as they keep up."""
        self._send(b"", (topic, encode(message)))

    def keys_changed(self) -> None:
        """Cut the connections of those who are no longer admitted."""
        self._transport.num_cut += self._connections.cut_unless(self._is_admitted)

    def _is_admitted(self, key: str) -> bool:
        peer = self._transport.peer(key, CLUSTER_DOMAIN)
        return peer is not None and may_say(peer.roles, Subscribe)

    def _receive(self, parts: list[bytes]) -> None:
        raise AssertionError("a publisher hears nothing")

    def _receive_one(self) -> bool:
        if not self._has_keys:
            # Reading the events lets ZeroMQ process subscriptions; a PUB has nothing to receive.
            self._socket.getsockopt(zmq.EVENTS)
            return False
        try:
            frame = self._socket.recv(_NOBLOCK, copy=False)
        except zmq.Again:
            return False
        word = frame.bytes
        if word[:1] == _SUBSCRIBES and len(word) <= MAX_TOPIC_BYTES:
            self._subscribed(frame, word[1:])
        elif word[:1] != _UNSUBSCRIBES:
            self._count_bad()
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
        return True

    def _subscribed(self, frame: zmq.Frame, topic: bytes) -> None:
        key, descriptor = str(frame.get("User-Id")), frame.get(zmq.SRCFD)
        assert self._monitor is not None
        assert isinstance(descriptor, int)
        self._monitor.drain()
        if not self._connections.spoke(descriptor, b"", key):
            return  # it has left
        if self._is_admitted(key):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        else:
            self._transport.num_refused += 1
            self.keys_changed()

    def _connection_event(self, event: int, descriptor: int) -> None:
        if event == ACCEPTED and not self._connections.accepted(descriptor):
            self._transport.num_cut += 1
        elif event == DISCONNECTED:
            self._connections.closed(descriptor)

    def close(self) -> None:
        """Close the monitor and the socket."""
        if self._monitor is not None:
            self._monitor.close()
        super().close()


class SubscriberSocket(Channel, Generic[T]):
    """Hears all topics of the publisher at `endpoint`, which need not exist yet.

    `server_role`: what the publisher's key must be admitted as, where the registry named it; it is
    not heard while it is not (see Transport.is_barred). BrokenError or ConfigError for an address
    that cannot be."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[T],
        on_message: Callable[[bytes, T], None],
        *,
        server_key: str = "",
        server_role: PeerRole | None = None,
        limits: SocketLimits | None = None,
        name: str = "",
    ) -> None:
        super().__init__(transport, zmq.SUB, limits or SocketLimits(), name or endpoint)
        self._endpoint = endpoint
        self._decode = decoder.decode
        self._on_message = on_message
        self._server_key = server_key
        self._server_role = server_role
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._is_suspended = bool(server_key) and self._is_barred
        self._monitor: ConnectionMonitor | None = None
        if transport.security is not None:
            self._monitor = self._watch(self._connection_event)
        if self._is_suspended:
            _log.warning("peer_not_admitted", socket=self.name, endpoint=endpoint)
        else:
            try:
                self._connect(endpoint, server_key, server_role)
            except XllmError:
                self.close()
                raise
        if server_key:
            transport.watch_keys(self)

    def keys_changed(self) -> None:
        """Stop hearing a publisher whose key is not admitted any more, until it is again."""
        if self._closed:
            return
        is_barred = self._is_barred
        if is_barred and not self._is_suspended:
            self._is_suspended = True
            self._transport.num_cut += 1
            self._disconnect(self._endpoint)
        elif self._is_suspended and not is_barred:
            self._is_suspended = False
            self._connect_again()

    @property
    def _is_barred(self) -> bool:
        return self._transport.is_barred(self._server_key, self._server_role)

    def _connection_event(self, event: int, descriptor: int) -> None:
        if event == REFUSED:
            self._loop.call_later(REFUSED_PAUSE_S, self._try_again)

    def _try_again(self) -> None:
        if self._closed or self._is_suspended:
            return
        self._disconnect(self._endpoint)
        self._connect_again()

    def _connect_again(self) -> None:
        """Nobody waits for the outcome: what fails is tried until it does not."""
        try:
            self._connect(self._endpoint, self._server_key, self._server_role)
        except XllmError as error:
            _log.warning("reconnect_failed", socket=self.name, error=error.message)
            self._loop.call_later(REFUSED_PAUSE_S, self._try_again)

    def close(self) -> None:
        """Close the monitor and the socket."""
        if self._monitor is not None:
            self._monitor.close()
        super().close()

    def _receive(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            self._count_bad()
            return
        try:
            message = self._decode(parts[1])
        except BadMessageError:
            self._count_bad()
            return
        self._on_message(parts[0], message)
