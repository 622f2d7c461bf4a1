"""A transport that sends the head of a response together with what follows it.

uvicorn writes head and body apart, and each write is a system call and a packet. Knows nothing
of HTTP but how a response's head begins. Invariant: bytes leave in the order they were written,
at the latest when the loop comes round.
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD = b"HTTP/1.1 "
INTERIM = b"HTTP/1.1 1"


class JoiningTransport(asyncio.Transport):
    """Wraps the transport of one connection."""

    __slots__ = ("_held", "_inner", "_loop", "_write")

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._write = inner.write
        self._held = b""

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send bytes, a head a moment later."""
        if self._held:
            held, self._held = self._held, b""
            self._write(held + data)
        elif data[:9] == HEAD and data[:10] != INTERIM:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)
        else:
            self._write(data)

    def write_whole(self, data: bytes) -> None:
        """Send bytes that nothing has to follow."""
        self._flush()
        self._write(data)

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._inner.is_closing():
            self._write(held)

    def write_eof(self) -> None:
        """Send what is held, then the end."""
        self._flush()
        self._inner.write_eof()

    def close(self) -> None:
        """Send what is held, then close."""
        self._flush()
        self._inner.close()

    def abort(self) -> None:
        """Drop everything."""
        self._held = b""
        self._inner.abort()

    def can_write_eof(self) -> bool:
        """See asyncio."""
        return self._inner.can_write_eof()

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._inner.is_closing()

    def pause_reading(self) -> None:
        """See asyncio."""
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        """See asyncio."""
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        return self._inner.get_extra_info(name, default)
