"""The binding side: one socket for many peers, each known by the identity of its connection.

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
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.channel import Channel
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.monitor import DISCONNECTED, ConnectionMonitor
from xllm.protocol.transport.security import CLUSTER_DOMAIN

T = TypeVar("T")
_NOBLOCK = zmq.NOBLOCK


class RouterSocket(Channel, Generic[T]):
    """Binds `endpoint` and speaks one conversation with everybody who connects.

    `on_message(identity, message, frames)` for each message; `on_gone(identity)` once for each
    connection that had spoken and is lost; `bad_reply(text)` makes the answer to frames that do
    not decode. `domain`: whose keys are admitted (see security). `endpoint` is the address that
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
        limits: SocketLimits | None = None,
        domain: str = CLUSTER_DOMAIN,
        name: str = "",
    ) -> None:
        super().__init__(transport, zmq.ROUTER, limits or SocketLimits(), name or endpoint)
        self._decode = decoder.decode
        self._on_message = on_message
        self._on_gone = on_gone
        self._bad_reply = bad_reply
        self._peers: set[bytes] = set()
        self._peer_of_fd: dict[int, bytes] = {}
        self._monitor: ConnectionMonitor | None = None
        if not endpoint.startswith("inproc://"):
            self._monitor = ConnectionMonitor(transport, self._socket, self._connection_event)
        self.endpoint = self._bind(endpoint, domain)

    @property
    def peers(self) -> frozenset[bytes]:
        """Identities of the connections that have spoken and are open."""
        return frozenset(self._peers)

    def send(self, identity: bytes, message: msgspec.Struct, frames: Sequence[bytes] = ()) -> None:
        """Send to one peer. BrokenError: it is gone. BackpressureError: it does not read."""
        self._send(identity, (identity, encode(message), *frames))

    def num_queued(self, identity: bytes) -> int:
        """Messages that wait for a peer that does not read as fast as we write."""
        outbox = self._outboxes.get(identity)
        return len(outbox.messages) if outbox is not None else 0

    def send_encoded(self, identity: bytes, body: bytes) -> None:
        """The same for a message that is encoded already."""
        self._send(identity, (identity, body))

    def _receive_one(self) -> bool:
        socket = self._socket
        try:
            identity = socket.recv(_NOBLOCK)
        except zmq.Again:
            return False
        if not socket.getsockopt(zmq.RCVMORE):
            self._num_bad += 1
            return True
        if identity in self._peers:
            body = socket.recv(_NOBLOCK)
        else:
            frame = socket.recv(_NOBLOCK, copy=False)
            body = frame.bytes
            self._note_peer(identity, frame)
        frames: list[bytes] = []
        size = len(body)
        while socket.getsockopt(zmq.RCVMORE):
            part = socket.recv(_NOBLOCK)
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
            self._num_bad += 1
            self._refuse(identity, error.message)
            return True
        self._on_message(identity, message, frames)
        return True

    def _note_peer(self, identity: bytes, frame: zmq.Frame) -> None:
        if self._monitor is not None:
            self._monitor.drain()
            descriptor = frame.get(zmq.SRCFD)
            assert isinstance(descriptor, int)
            self._peer_of_fd[descriptor] = identity
        self._peers.add(identity)

    def _connection_event(self, event: int, descriptor: int) -> None:
        if event != DISCONNECTED:
            return
        identity = self._peer_of_fd.pop(descriptor, None)
        if identity is None:
            return
        self._peers.discard(identity)
        self._outboxes.pop(identity, None)
        if self._on_gone is not None:
            # Later, so that what the peer said before it left is handled first.
            self._loop.call_soon(self._tell_gone, identity)

    def _tell_gone(self, identity: bytes) -> None:
        if self._closed or self._on_gone is None:
            return
        self._look()
        try:
            self._on_gone(identity)
        except Exception as error:
            self._transport.handler_failed(self.name, error)

    def _refuse(self, identity: bytes, text: str) -> None:
        if self._bad_reply is None:
            return
        try:
            self.send(identity, self._bad_reply(text))
        except (BackpressureError, BrokenError):
            pass  # it spoke nonsense and left, or does not read what it is told

    def close(self) -> None:
        """Close the monitor and the socket."""
        if self._monitor is not None:
            self._monitor.close()
        super().close()
