"""Ports for processes that are told theirs."""

from __future__ import annotations

import contextlib
import random
import socket

_PORTS = range(20_000, 32_000)
"""Below those that Linux gives to whoever asks for any, listeners and connections: one of these
would be somebody else's now and then before its process has begun."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has just now."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            port = random.choice(_PORTS)
            with contextlib.suppress(OSError):  # taken: another one is tried
                probe.bind(("127.0.0.1", port))
                found.append(port)
        return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
