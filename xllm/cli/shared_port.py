"""A TCP port that several processes of this user listen on, held for as long as the service lives.

A socket that is bound and does not listen gets no connection, but keeps the number: a port that
the kernel chose stays the same for all routers, and nobody takes it while one of them starts again.
"""

from __future__ import annotations

import socket

from xllm.errors import ListenError


class SharedPort:
    """Holds `port` of `host` (0: a free one is found); ListenError where it is taken."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._socket.bind((host.strip("[]"), port))
        except OSError as error:
            self._socket.close()
            raise ListenError(
                f"cannot listen on {host}:{port}: {error.strerror}", param="router.port"
            ) from error
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port up."""
        self._socket.close()
