"""A ZeroMQ socket on the running loop: drained with NOBLOCK until it is empty, in one go.

ZeroMQ's descriptor is edge-triggered: after any send or receive its events must be read again,
so every bind, connect and send schedules one look. What the socket does not take at once waits
in a bounded queue for each peer; a timer retries, since a ROUTER cannot say when one of its
peers reads again.

The first message of a turn of the loop leaves at once, those behind it leave together, at the
end of the turn: ZeroMQ's thread is woken, and writes to the connection, for every message that it
finds alone, which costs more than all the rest of sending it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from collections.abc import Callable, Sequence

import zmq

from xllm.errors import BrokenError, ClosedError, ListenError, XllmError
from xllm.protocol.authority import PeerRole
from xllm.protocol.transport.allow_list import CLUSTER_DOMAIN
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import PathLock, check_bindable, is_local
from xllm.protocol.transport.limits import SocketLimits, apply_options
from xllm.protocol.transport.monitor import ConnectionMonitor
from xllm.protocol.transport.outbox import Outboxes
from xllm.protocol.transport.security import secure_client, secure_server

_DRAIN_BATCH = 512
_MAX_BURST = 8
"""Messages that leave together: with more of them nothing is saved, and the first ones wait."""
_SMALL_BYTES = 16384
"""Larger ones never wait for others."""
_RETRY_S = 0.002
_FLUSH_PAUSE_S = 0.001
_NOBLOCK = zmq.NOBLOCK
_NOBLOCK_MORE = zmq.NOBLOCK | zmq.SNDMORE


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """Counts since the socket was made."""

    num_received: int
    num_sent: int
    num_bad: int
    num_queued: int
    queued_bytes: int


class Channel:
    """What all sockets share. Subclasses implement `_receive(parts)`."""

    def __init__(self, transport: Transport, kind: int, limits: SocketLimits, name: str) -> None:
        self.name = name
        self._transport = transport
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._socket = transport.socket(kind)
        # The compiled method itself: what pyzmq puts before it is for options not used here.
        self._send_part = super(zmq.Socket, self._socket).send
        self._fd: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]  # FD is an int
        self._outboxes = Outboxes(name, limits)
        self._behind = self._outboxes.peers
        """Peers that something waits for already."""
        self._burst: list[tuple[bytes, Sequence[bytes]]] = []
        """Peers and messages that leave at the next look, which is scheduled."""
        self._look_scheduled = False
        self._next_flush = 0.0
        """On the loop's clock: what waits is not tried again before."""
        self._retry: asyncio.TimerHandle | None = None
        self._lock: PathLock | None = None
        self._closed = False
        self._num_received = 0
        self._num_sent = 0
        self._num_bad = 0
        self._loop.add_reader(self._fd, self._look)

    def _watch(self, on_event: Callable[[int, int], None]) -> ConnectionMonitor:
        """Be told of connections. Where that fails the socket is closed before it raises."""
        try:
            return ConnectionMonitor(self._transport, self._socket, on_event)
        except XllmError:
            self.close()
            raise

    # -- opening -----------------------------------------------------------------------------

    def _bind(self, endpoint: str, domain: str = CLUSTER_DOMAIN) -> str:
        """Bind and return the bound address; a socket that cannot is closed before it raises.
        `domain` says whose keys are admitted."""
        try:
            security = self._transport.security
            check_bindable(endpoint, has_keys=security is not None)
            apply_options(self._socket, self._limits, endpoint)
            if endpoint.startswith("tcp://") and security is not None:
                secure_server(self._socket, security, domain)
            if endpoint.startswith("ipc://"):
                self._lock = PathLock(endpoint.removeprefix("ipc://"))
            previous = os.umask(0o077)  # for the socket's file, wherever it lies
            try:
                self._socket.bind(endpoint)
            finally:
                os.umask(previous)
        except zmq.ZMQError as error:
            self.close()
            raise ListenError(f"cannot listen on {endpoint}: {error.strerror}") from error
        except OSError as error:
            self.close()
            raise ListenError(f"cannot listen on {endpoint}: {error.strerror}") from error
        except XllmError:
            self.close()
            raise
        self._schedule_look()
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        return endpoint if endpoint.startswith("inproc") else _text(bound)

    def _connect(
        self, endpoint: str, server_key: str = "", server_role: PeerRole | None = None
    ) -> None:
        """Connect. `server_role`: see Transport.is_barred; with one, a process that has keys speaks
        TCP to nobody without."""
        security = self._transport.security
        try:
            apply_options(self._socket, self._limits, endpoint)
            if server_key and endpoint.startswith("tcp://"):
                # Only TCP is bound with keys: an ipc path is guarded by its directory.
                if security is None:
                    raise BrokenError(f"{endpoint} demands keys and this process has none")
                if self._transport.is_barred(server_key, server_role):
                    raise BrokenError(f"the key of {endpoint} is not admitted")
                secure_client(self._socket, security, server_key)
            elif server_role and security is not None and endpoint.startswith("tcp://"):
                raise BrokenError(f"{endpoint} has no key, and this process has")
            elif not is_local(endpoint):
                raise BrokenError(f"{endpoint} is on another machine and no key of it is known")
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise BrokenError(f"cannot connect to {endpoint}: {error.strerror}") from error
        self._schedule_look()

    def _disconnect(self, endpoint: str) -> None:
        """End a connection that `_connect` began. One that there is not is ignored."""
        try:
            self._socket.disconnect(endpoint)
        except zmq.ZMQError as error:
            if error.errno != errno.ENOENT:
                raise

    # -- receiving ---------------------------------------------------------------------------

    def _look(self) -> None:
        """Flush what waits, then read all that is there (up to a fair share of the loop).

        In this order: a send may swallow the descriptor's edge for what has arrived meanwhile,
        and nothing but a receive that finds nothing arms it again. Each look follows a send or
        an event; peers that do not read are not worth a try at each of them."""
        self._look_scheduled = False
        if self._burst:
            self._send_burst()
        if self._outboxes and not self._closed and self._loop.time() >= self._next_flush:
            self._flush_all()
        for _ in range(_DRAIN_BATCH):
            if self._closed:
                return
            try:
                if not self._receive_one():
                    break
            except Exception as error:
                self._transport.handler_failed(self.name, error)
        else:
            self._schedule_look()

    def _receive_one(self) -> bool:
        # As a frame, which knows whether more follow: to ask the socket costs more than to receive.
        socket = self._socket
        try:
            frame = socket.recv(_NOBLOCK, copy=False)
        except zmq.Again:
            return False
        parts = [frame.bytes]
        while frame.more:
            frame = socket.recv(_NOBLOCK, copy=False)
            parts.append(frame.bytes)
            if len(parts) > self._limits.max_frames + 1:
                self._discard_rest()
                return True
        self._num_received += 1
        self._receive(parts)
        return True

    def _count_bad(self) -> None:
        self._num_bad += 1
        self._transport.num_bad += 1

    def _discard_rest(self) -> None:
        self._count_bad()
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv(_NOBLOCK)

    def _receive(self, parts: list[bytes]) -> None:
        raise AssertionError("subclasses receive")

    def _schedule_look(self) -> None:
        if not self._look_scheduled and not self._closed:
            self._look_scheduled = True
            self._loop.call_soon(self._look)

    # -- sending -----------------------------------------------------------------------------

    def _send(self, peer: bytes, parts: Sequence[bytes]) -> None:
        """Send now or with others of this turn, or queue behind what waits for `peer` already.
        BackpressureError past the bound, and BrokenError where the peer is gone, are told of what
        leaves at once; of what leaves with others the end of the connection tells, or the next
        message: they pass the bound by a burst at most."""
        if self._closed:
            raise ClosedError(f"{self.name} is closed")
        if self._look_scheduled:
            burst = self._burst
            if peer not in self._behind and sum(map(len, parts)) <= _SMALL_BYTES:
                burst.append((peer, parts))
                if len(burst) >= _MAX_BURST:
                    self._send_burst()
                return
            if burst:
                self._send_burst()
        else:
            # First, for one that fails may swallow the descriptor's edge, too.
            self._look_scheduled = True
            self._loop.call_soon(self._look)
        if peer in self._behind or not self._try_send(parts):
            self._outboxes.put(peer, parts)
            self._schedule_retry()

    def flush(self) -> None:
        """What was sent in this turn of the loop leaves now: before work that takes long."""
        if self._burst:
            self._send_burst()

    def _send_burst(self) -> None:
        burst, self._burst = self._burst, []
        for peer, parts in burst:
            try:
                if peer in self._behind or not self._try_send(parts):
                    self._outboxes.put(peer, parts, anyway=True)
                    self._schedule_retry()
            except BrokenError:
                pass  # the peer is gone, and so is its connection, which is told
            except Exception as error:
                self._transport.handler_failed(self.name, error)  # the others leave

    def _try_send(self, parts: Sequence[bytes]) -> bool:
        send = self._send_part
        last = len(parts) - 1
        try:
            for index, part in enumerate(parts):
                send(part, _NOBLOCK if index == last else _NOBLOCK_MORE)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise BrokenError(f"{self.name}: the peer is gone") from error
            raise BrokenError(f"{self.name}: {error.strerror}") from error
        self._num_sent += 1
        return True

    def _discard(self, peer: bytes) -> int:
        """Forget what has not left for a peer; returns how many messages that was."""
        burst = [one for one in self._burst if one[0] != peer]
        num_dropped = len(self._burst) - len(burst) + self._outboxes.drop(peer)
        self._burst = burst
        return num_dropped

    def _schedule_retry(self) -> None:
        if self._retry is None and not self._closed:
            self._retry = self._loop.call_later(_RETRY_S, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        if self._outboxes and not self._closed:
            self._flush_all()
            self._schedule_look()

    def _flush_all(self) -> None:
        self._next_flush = self._loop.time() + _FLUSH_PAUSE_S
        self._outboxes.flush(self._try_send)
        if self._outboxes:
            self._schedule_retry()

    # -- the end -----------------------------------------------------------------------------

    def statistics(self) -> ChannelStatistics:
        """Counts since the socket was made."""
        num_queued, queued_bytes = self._outboxes.totals()
        queued_bytes += sum(len(part) for _, parts in self._burst for part in parts)
        return ChannelStatistics(
            self._num_received,
            self._num_sent,
            self._num_bad,
            num_queued + len(self._burst),
            queued_bytes,
        )

    def close(self) -> None:
        """Close the socket; what waits is dropped. Closing again does nothing."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._loop.remove_reader(self._fd)
        if self._retry is not None:
            self._retry.cancel()
        self._outboxes.clear()
        self._socket.close(0)
        if self._lock is not None:
            self._lock.release()


def _text(value: object) -> str:
    assert isinstance(value, bytes)
    return value.rstrip(b"\0").decode()
