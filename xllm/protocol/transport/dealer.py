"""The connecting side: one socket to one peer, reconnecting for as long as it lives."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec
import structlog
import zmq

from xllm.errors import BadMessageError, XllmError
from xllm.protocol.authority import PeerRole
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.channel import Channel
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.monitor import (
    CONNECTED,
    DISCONNECTED,
    KEYS_DIFFER,
    MISUNDERSTOOD,
    REACHED,
    REFUSED,
    REFUSED_PAUSE_S,
    ConnectionMonitor,
)

_log = structlog.get_logger("transport")
T = TypeVar("T")


class Reach(enum.Enum):
    """How far a socket came with its peer, at most."""

    NOTHING = enum.auto()
    """Nothing takes connections at the address."""
    SOMETHING = enum.auto()
    """Something does, but said no word of ZeroMQ."""
    OTHER_KEYS = enum.auto()
    """It speaks ZeroMQ with keys where we do without, or the other way round."""
    REFUSED = enum.auto()
    """It does not accept our key."""
    PEER = enum.auto()
    """There was a connection."""


class DealerSocket(Channel, Generic[T]):
    """Connects to `endpoint` and speaks one conversation with it.

    `on_message(message, frames)` for each message; `on_connected()` and `on_gone()` as the
    connection comes and goes (never over inproc); `on_refused()` where the peer does not accept
    our key. Messages sent while there is no connection wait in the bounded queue.
    `server_role`: what the peer's key must be admitted as, where the registry named it; there is
    no connection while it is not (see Transport.is_barred)."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        decoder: Decoder[T],
        on_message: Callable[[T, list[bytes]], None],
        *,
        on_gone: Callable[[], None] | None = None,
        on_connected: Callable[[], None] | None = None,
        on_refused: Callable[[], None] | None = None,
        server_key: str = "",
        server_role: PeerRole | None = None,
        limits: SocketLimits | None = None,
        name: str = "",
    ) -> None:
        super().__init__(transport, zmq.DEALER, limits or SocketLimits(), name or endpoint)
        self.endpoint = endpoint
        self._decode = decoder.decode
        self._on_message = on_message
        self._on_gone = on_gone
        self._on_connected = on_connected
        self._on_refused = on_refused
        self._server_key = server_key
        self._server_role = server_role
        self._is_suspended = bool(server_key) and self._is_barred
        self._monitor: ConnectionMonitor | None = None
        self._gone_untold = False
        self.reach = Reach.NOTHING
        self.connected = endpoint.startswith("inproc://")
        if not self.connected:
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
        """Leave a peer whose key is not admitted any more, and come back to one that is again."""
        if self._closed:
            return
        is_barred = self._is_barred
        if is_barred and not self._is_suspended:
            self._is_suspended = True
            self._disconnect(self.endpoint)
            self._transport.num_cut += 1
            self._connection_event(DISCONNECTED, -1)
        elif self._is_suspended and not is_barred:
            self._is_suspended = False
            self._connect(self.endpoint, self._server_key, self._server_role)

    @property
    def _is_barred(self) -> bool:
        return self._transport.is_barred(self._server_key, self._server_role)

    def send(self, message: msgspec.Struct, frames: Sequence[bytes] = ()) -> None:
        """Send, or queue while there is no connection. BackpressureError past the bound."""
        self._send(b"", (encode(message), *frames))

    def send_encoded(self, data: bytes) -> None:
        """`send` of a message that its sender has encoded."""
        self._send(b"", (data,))

    def discard_queued(self) -> int:
        """Forget what waits for a connection; returns how many messages that was."""
        return self._discard(b"")

    def _receive(self, parts: list[bytes]) -> None:
        try:
            message = self._decode(parts[0])
        except BadMessageError:
            self._count_bad()
            return
        self._on_message(message, parts[1:])

    def _connection_event(self, event: int, descriptor: int) -> None:
        if event == CONNECTED:
            if self._gone_untold:
                self._tell_gone()  # both events waited: a process that was stopped, say
            self.connected = True
            self.reach = Reach.PEER
            if self._outboxes:
                self._schedule_look()
            if self._on_connected is not None:
                self._on_connected()
        elif event == DISCONNECTED and self.connected:
            self.connected = False
            self._gone_untold = True
            # Later, so that what the peer said before it left is handled first.
            self._loop.call_soon(self._tell_gone)
        elif event == REFUSED:
            self.reach = Reach.REFUSED
            self._loop.call_later(REFUSED_PAUSE_S, self._try_again)
            if self._on_refused is not None:
                self._on_refused()
        elif event == REACHED and self.reach is Reach.NOTHING:
            self.reach = Reach.SOMETHING
        elif event == MISUNDERSTOOD and descriptor == KEYS_DIFFER:
            self.reach = Reach.OTHER_KEYS

    def _try_again(self) -> None:
        if self._closed or self._is_suspended or self.connected:
            return
        self._disconnect(self.endpoint)
        self._connect(self.endpoint, self._server_key, self._server_role)

    def _tell_gone(self) -> None:
        if self._closed or not self._gone_untold:
            return
        self._gone_untold = False
        self._look()
        if self._on_gone is not None and not self._closed:
            try:
                self._on_gone()
            except Exception as error:
                self._transport.handler_failed(self.name, error)

    def close(self) -> None:
        """Close the monitor and the socket; what waits is dropped."""
        self.connected = False
        if self._monitor is not None:
            self._monitor.close()
        super().close()
