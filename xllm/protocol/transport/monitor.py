"""Which connection of a socket came or went: events of ZeroMQ's own monitor, by descriptor."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

import zmq

from xllm.errors import BackpressureError
from xllm.protocol.transport.context import Transport

CONNECTED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
ACCEPTED = int(zmq.EVENT_ACCEPTED)
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
REACHED = int(zmq.EVENT_CONNECTED)
"""Something took the connection; whether it speaks ZeroMQ is not known yet."""
MISUNDERSTOOD = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
KEYS_DIFFER = 0x11000002
"""MISUNDERSTOOD comes with this where one side speaks with keys and the other without
(ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)."""
_EVENTS = ACCEPTED | CONNECTED | DISCONNECTED | REFUSED | REACHED | MISUNDERSTOOD
REFUSED_PAUSE_S = 0.5
"""ZeroMQ never tries a peer again that did not accept our key; we do, after this time: it may be
admitted by then."""


class ConnectionMonitor:
    """Calls `on_event(event, value)` for connections of one socket. `value`: a descriptor, or what
    is wrong where MISUNDERSTOOD happened."""

    def __init__(
        self,
        transport: Transport,
        socket: zmq.Socket[bytes],
        on_event: Callable[[int, int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._watched = socket
        self._on_event = on_event
        self._closed = False
        address = f"inproc://monitor-{id(self)}"
        self._socket = transport.socket(zmq.PAIR)
        try:
            socket.monitor(address, _EVENTS)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise BackpressureError(f"no further socket: {error.strerror}") from error
        self._socket.setsockopt(zmq.LINGER, 0)
        # Else the context's I/O thread would wait here for a loop that is busy.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._fd: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]  # FD is an int
        self._loop.add_reader(self._fd, self.drain)
        self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """Deliver all events that happened so far."""
        while not self._closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event, value = struct.unpack("=Hi", parts[0])
            try:
                self._on_event(event, value)
            except Exception as error:
                self._transport.handler_failed("monitor", error)

    def close(self) -> None:
        """Stop listening. Call it before the watched socket is closed."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._socket.close(0)
