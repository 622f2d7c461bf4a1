"""Bounds and options that every socket gets: nothing here is left to a library's default."""

from __future__ import annotations

import dataclasses
import resource

import zmq

SPARE_DESCRIPTORS = 32
"""Open files that connections never use."""


@dataclasses.dataclass(frozen=True)
class SocketLimits:
    """Bounds of one socket. MAXMSGSIZE is per frame, so frames and their sum are capped too."""

    max_frame_bytes: int = 64 << 20
    max_frames: int = 16
    max_message_bytes: int = 256 << 20
    high_water_mark: int = 1000
    max_queued_messages: int = 20_000
    """Messages kept for one peer that does not read, beyond ZeroMQ's own queue."""
    max_queued_bytes: int = 64 << 20
    max_connections: int = 4096
    """Accepted at a time; no process takes more than its open files leave room for."""


def client_limits(max_bytes: int) -> SocketLimits:
    """For sockets that clients reach: they are not trusted to be gentle. `max_bytes` of one
    message; a connection that sends a longer frame is closed before the frame is kept."""
    return SocketLimits(
        max_frame_bytes=max_bytes,
        max_frames=4,
        max_message_bytes=max_bytes,
        max_queued_bytes=32 << 20,
    )


def connection_limit(limits: SocketLimits) -> int:
    """How many connections a socket accepts: what is left of the process's open files is shared by
    the few sockets that it has."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits.max_connections
    return max(8, min(limits.max_connections, (soft - SPARE_DESCRIPTORS) // 2))


def apply_options(socket: zmq.Socket[bytes], limits: SocketLimits, endpoint: str) -> None:
    """Set what every socket needs.

    None has heartbeats of ZMTP, which make libzmq abort a process that falls behind, in two ways
    (its issues 3937 and 4364): a connection whose queue is full is not read, and is ended for what
    was not read; and where its peer ends it meanwhile, the next heartbeat finds an engine that must
    not write. So silence is judged by words of our own, and a host that vanished by the kernel."""
    socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, limits.high_water_mark)
    socket.setsockopt(zmq.RCVHWM, limits.high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_frame_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.TCP_MAXRT, 10_000)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.BACKLOG, 1024)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    if socket.type == zmq.DEALER:
        socket.setsockopt(zmq.IMMEDIATE, 1)
