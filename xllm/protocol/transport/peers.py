"""The connections that one binding socket has accepted: how many, whose, and how to cut one.

ZeroMQ keeps a connection open whose key was revoked since, and bounds nothing. A connection is
known by its descriptor (the monitor says when it came and went, a message's metadata which one it
came by), and shutting that down ends it: the I/O thread finds it closed. Descriptors are used
again, so only one whose two ends are still those of the connection is shut down.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import structlog

_log = structlog.get_logger("transport")

Ends = tuple[object, object]
"""Names of both ends: (ours, the peer's)."""


class AcceptedConnection:
    """A connection by its descriptor; `key` is "" until it has spoken, and without keys."""

    __slots__ = ("ends", "identity", "is_cut", "key")

    def __init__(self, ends: Ends | None) -> None:
        self.ends = ends
        self.identity = b""
        self.key = ""
        self.is_cut = False


class AcceptedConnections:
    """All of one socket, at most `most` (more are cut as they come)."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._by_fd: dict[int, AcceptedConnection] = {}
        self._warned = False

    def __len__(self) -> int:
        return len(self._by_fd)

    def accepted(self, fd: int) -> bool:
        """A connection came; False where it was one too many, and is cut."""
        connection = self._by_fd[fd] = AcceptedConnection(_ends(fd))
        if len(self._by_fd) <= self._most:
            return True
        if not self._warned:
            self._warned = True
            _log.warning("too_many_connections", socket=self._name, most=self._most)
        _shut(fd, connection)
        return False

    def spoke(self, fd: int, identity: bytes, key: str) -> bool:
        """The first message of a connection came, with the key it was authenticated by; False
        where the connection has ended since."""
        connection = self._by_fd.get(fd)
        if connection is None:
            return False
        connection.identity = identity
        connection.key = key
        return True

    def closed(self, fd: int) -> bytes:
        """A connection ended: its identity, or b"" where it never spoke."""
        connection = self._by_fd.pop(fd, None)
        return connection.identity if connection is not None else b""

    def cut_unless(self, admitted: Callable[[str], bool]) -> int:
        """End the connections that spoke with a key which is not admitted; the monitor will tell of
        them. Returns how many those were."""
        num_cut = 0
        for fd, one in self._by_fd.items():
            if one.key and not one.is_cut and not admitted(one.key):
                one.is_cut = True
                _shut(fd, one)
                num_cut += 1
        return num_cut


def _copy_of(fd: int) -> socket.socket | None:
    """What has that descriptor just now, under a number of its own; None where it is no socket."""
    try:
        number = os.dup(fd)
    except OSError:
        return None
    try:
        return socket.socket(fileno=number)
    except OSError:
        os.close(number)
        return None


def _ends(fd: int) -> Ends | None:
    copy = _copy_of(fd)
    if copy is None:
        return None
    with copy:
        return _ends_of(copy)


def _ends_of(copy: socket.socket) -> Ends | None:
    try:
        return copy.getsockname(), copy.getpeername()
    except OSError:
        return None


def _shut(fd: int, connection: AcceptedConnection) -> None:
    copy = _copy_of(fd)
    if copy is None:
        return  # it is closed already
    with copy:
        ends = _ends_of(copy)
        if ends is None or ends != connection.ends:
            return  # it ended, and somebody else has its number
        try:
            copy.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster
