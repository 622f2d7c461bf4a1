"""The binding side: one socket for many peers, each known by the identity of its connection.

Where the endpoint demands keys, a message is heard only if the roles of its sender's key may say
it, and the connections of a key that was revoked are cut.

A ROUTER is not told who left. The descriptor of a connection's first message, joined with the
monitor's DISCONNECTED event, tells it within a tenth of a millisecond. Descriptors are used
again, so pending events are delivered before a new identity is noted: ZeroMQ's one I/O thread
reports the end of the old connection before anything of the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec
import zmq

from xllm.errors import BackpressureError, BadMessageError, BrokenError
from xllm.protocol.authority import KnownPeer, may_say
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.allow_list import CLUSTER_DOMAIN
from xllm.protocol.transport.channel import Channel
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits, connection_limit
from xllm.protocol.transport.monitor import ACCEPTED, DISCONNECTED, ConnectionMonitor
from xllm.protocol.transport.peers import AcceptedConnections

T = TypeVar("T")
_NOBLOCK = zmq.NOBLOCK


class RouterSocket(Channel, Generic[T]):
    """Binds `endpoint` and speaks one conversation with everybody who connects.

    `on_message(identity, message, frames)` for each message; `on_gone(identity)` once for each
    connection that had spoken and is lost; `bad_reply(text)` makes the answer to frames that do
    not decode, `denied_reply(message, text)` (else `bad_reply`) to what the peer may not say.
    `domain`: whose keys are admitted (see security). `endpoint` is the address that
    was bound (a port 0 is resolved)."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[T],
        on_message: Callable[[bytes, T, list[bytes]], None],
        *,
        on_gone: Callable[[bytes], None] | None = None,
        bad_reply: Callable[[str], msgspec.Struct] | None = None,
        denied_reply: Callable[[T, str], msgspec.Struct] | None = None,
        limits: SocketLimits | None = None,
        domain: str = CLUSTER_DOMAIN,
        name: str = "",
    ) -> None:
        super().__init__(transport, zmq.ROUTER, limits or SocketLimits(), name or endpoint)
        self._decode = decoder.decode
        self._on_message = on_message
        self._on_gone = on_gone
        self._bad_reply = bad_reply
        self._denied_reply = denied_reply
        self._domain = domain
        self._keys: dict[bytes, str] = {}
        """The key of each connection that has spoken, "" for none."""
        self._leaving: set[bytes] = set()
        """Lost connections of which nobody was told yet."""
        self._has_keys = endpoint.startswith("tcp://") and transport.security is not None
        self._connections = AcceptedConnections(self.name, connection_limit(self._limits))
        self._monitor: ConnectionMonitor | None = None
        if not endpoint.startswith("inproc://"):
            self._monitor = self._watch(self._connection_event)
        self.endpoint = self._bind(endpoint, domain)
        if self._has_keys:
            transport.watch_keys(self)

    @property
    def peers(self) -> frozenset[bytes]:
        """Identities of the connections that have spoken and are open."""
        return frozenset(self._keys)

    def peer(self, identity: bytes) -> KnownPeer | None:
        """Whose connection that is, by its key; None without keys, where everybody is one user."""
        key = self._keys.get(identity, "")
        return self._transport.peer(key, self._domain) if key else None

    def keys_changed(self) -> None:
        """Cut the connections of those who are no longer admitted; their words no longer count."""
        self._transport.num_cut += self._connections.cut_unless(self._is_admitted)

    def _is_admitted(self, key: str) -> bool:
        return self._transport.peer(key, self._domain) is not None

    def send(self, identity: bytes, message: msgspec.Struct, frames: Sequence[bytes] = ()) -> None:
        """Send to one peer. BrokenError: it is gone. BackpressureError: it does not read. (Neither
        is told of what leaves with others, see Channel.)"""
        self._send(identity, (identity, encode(message), *frames))

    def num_queued(self, identity: bytes) -> int:
        """Messages that wait for a peer that does not read as fast as we write."""
        return self._outboxes.count(identity)

    def send_encoded(self, identity: bytes, body: bytes) -> None:
        """The same for a message that is encoded already."""
        self._send(identity, (identity, body))

    def _receive_one(self) -> bool:
        socket = self._socket
        try:
            identity = socket.recv(_NOBLOCK)  # behind which a ROUTER always has more
        except zmq.Again:
            return False
        # As frames, which know whether more follow: to ask the socket costs more than to receive.
        frame = socket.recv(_NOBLOCK, copy=False)
        if self._has_keys or identity not in self._keys:
            self._note_peer(identity, frame)
        body = frame.buffer
        frames: list[bytes] = []
        size = len(body)
        while frame.more:
            frame = socket.recv(_NOBLOCK, copy=False)
            part = frame.bytes
            size += len(part)
            frames.append(part)
            if len(frames) >= self._limits.max_frames or size > self._limits.max_message_bytes:
                self._discard_rest()
                self._refuse(identity, "too many or too large frames")
                return True
        self._num_received += 1
        try:
            message = self._decode(body)
        except BadMessageError as error:
            self._count_bad()
            self._refuse(identity, error.message)
            return True
        if self._has_keys and not self._may_say(identity, message):
            return True
        self._on_message(identity, message, frames)
        return True

    def _may_say(self, identity: bytes, message: T) -> bool:
        peer = self.peer(identity)
        if peer is None:  # revoked: one that had not spoken before is cut now
            self.keys_changed()
            return False
        if may_say(peer.roles, type(message)):  # type: ignore[arg-type]  # a message is a Struct
            return True
        self._transport.num_refused += 1
        text = f"{peer.name} has no role that may say {type(message).__name__}"
        reply = self._denied_reply
        self._refuse(identity, text, None if reply is None else reply(message, text))
        return False

    def _note_peer(self, identity: bytes, frame: zmq.Frame) -> None:
        """Learn whose the connection is that a message came by."""
        key = str(frame.get("User-Id")) if self._has_keys else ""
        if self._keys.get(identity) == key:
            return
        if self._monitor is not None:
            self._monitor.drain()
            if identity in self._leaving:
                self._tell_gone(identity)  # somebody else has its name now
            descriptor = frame.get(zmq.SRCFD)
            assert isinstance(descriptor, int)
            if not self._connections.spoke(descriptor, identity, key):
                self._loop.call_soon(self._forget, identity)  # these are its last words
        self._keys[identity] = key

    def _connection_event(self, event: int, descriptor: int) -> None:
        if event == ACCEPTED and not self._connections.accepted(descriptor):
            self._transport.num_cut += 1
        if event == DISCONNECTED and (identity := self._connections.closed(descriptor)):
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        self._keys.pop(identity, None)
        self._discard(identity)
        if self._on_gone is not None:
            # Later, so that what the peer said before it left is handled first.
            self._leaving.add(identity)
            self._loop.call_soon(self._left, identity)

    def _left(self, identity: bytes) -> None:
        if not self._closed and identity in self._leaving:
            self._look()
            self._tell_gone(identity)

    def _tell_gone(self, identity: bytes) -> None:
        if self._closed or self._on_gone is None or identity not in self._leaving:
            return
        self._leaving.discard(identity)
        try:
            self._on_gone(identity)
        except Exception as error:
            self._transport.handler_failed(self.name, error)

    def _refuse(self, identity: bytes, text: str, reply: msgspec.Struct | None = None) -> None:
        if reply is None:
            if self._bad_reply is None:
                return
            reply = self._bad_reply(text)
        try:
            self.send(identity, reply)
        except (BackpressureError, BrokenError):
            pass  # it spoke nonsense and left, or does not read what it is told

    def close(self) -> None:
        """Close the monitor and the socket."""
        if self._monitor is not None:
            self._monitor.close()
        super().close()
