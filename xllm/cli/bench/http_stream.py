"""A small HTTP/1.1 client for streamed answers: POST a body, read server-sent events.

asyncio streams only, connections kept alive between requests. It knows HTTP and events, nothing
of OpenAI. What it cannot do is an error: no redirects, no compression, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

from xllm.errors import ConfigError

_LINE_LIMIT = 1 << 20
_ERROR_BYTES = 1 << 16
_SHOWN = 300
OnHead = Callable[[Mapping[str, str]], None]
"""Names in lower case."""


class RefusedError(Exception):
    """The server answered with a status that is no success."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:_SHOWN]}" if body else f"HTTP {status}")
        self.status = status


class CutError(Exception):
    """The connection ended, or spoke no HTTP, before the answer was complete."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a stream; `id` is empty where it has none."""

    data: bytes
    id: str = ""


@dataclasses.dataclass(frozen=True)
class HttpAddress:
    """Where a server listens, and the path that its API begins with."""

    host: str
    port: int
    secure: bool
    path: str

    @classmethod
    def parse(cls, url: str) -> HttpAddress:
        """ConfigError for what is no http or https address."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no address: {error}", param="base-url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{url!r} is no address of the form http://host:port/v1", param="base-url"
            )
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/"))

    @property
    def netloc(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _Connection:
    """One TCP connection; reads one answer after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.reusable = False

    def send(self, data: bytes) -> None:
        self.reusable = False
        self._writer.write(data)

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (lower-case names)."""
        line = await self._reader.readline()
        words = line.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise CutError("the connection ended without an answer" if not line else "no HTTP")
        headers: dict[str, str] = {}
        while (line := await self._reader.readline()) not in (b"\r\n", b"\n"):
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise CutError("the connection ended within the headers")
            headers[name.strip().lower()] = value.strip()
        return int(words[1]), headers

    async def read_body(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """The body as it comes; whole when this ends without an error."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            async for piece in self._read_chunks():
                yield piece
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                piece = await self._reader.read(min(left, _ERROR_BYTES))
                if not piece:
                    raise CutError("the connection ended within the answer")
                left -= len(piece)
                yield piece
        else:
            while piece := await self._reader.read(_ERROR_BYTES):
                yield piece
            return  # ended by the server: not to be used again
        self.reusable = headers.get("connection", "").lower() != "close"

    async def _read_chunks(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise CutError("the connection ended within the answer")
            size = int(line.split(b";")[0], 16)
            piece = await self._reader.readexactly(size + 2)
            if size == 0:
                return
            yield piece[:size]

    def close(self) -> None:
        self._writer.close()


class HttpStreams:
    """Connections to one server. `close` them."""

    def __init__(self, address: HttpAddress, headers: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._idle: list[_Connection] = []
        lines = {"Host": address.netloc, "Content-Type": "application/json", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._ssl = ssl.create_default_context() if address.secure else None

    async def get(self, path: str) -> bytes:
        """The body of a GET; RefusedError, CutError or OSError."""
        head = f"GET {self.address.path}{path} HTTP/1.1\r\n{self._headers}\r\n"
        return b"".join([piece async for piece in self._exchange(head.encode("latin-1"))])

    async def post_events(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The `data` of each event of the answer to a POST. RefusedError where the server does
        not answer with success, CutError where the answer is cut, OSError where none comes."""
        async with contextlib.aclosing(self.post_stream(path, body)) as events:
            async for event in events:
                yield event.data

    async def post_stream(
        self, path: str, body: bytes, last_id: str = "", on_head: OnHead | None = None
    ) -> AsyncGenerator[ServerEvent, None]:
        """The same with the id of each event. `last_id`: of the last one that came of an answer
        that was cut, to go on from there. `on_head` hears the headers of a success."""
        last = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        head = (
            f"POST {self.address.path}{path} HTTP/1.1\r\n{self._headers}{last}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        buffer = b""
        request = head.encode("latin-1") + body
        async with contextlib.aclosing(self._exchange(request, on_head)) as pieces:
            async for piece in pieces:
                buffer += piece
                if b"\r" in buffer:
                    buffer = buffer.replace(b"\r\n", b"\n")
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    if data := _field_of(event, b"data"):
                        yield ServerEvent(data, _field_of(event, b"id").decode("latin-1"))
        if data := _field_of(buffer, b"data"):
            yield ServerEvent(data, _field_of(buffer, b"id").decode("latin-1"))

    def close(self) -> None:
        """Close what is idle; connections in use close with their requests."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(
        self, request: bytes, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        connection, status, headers = await self._ask(request)
        try:
            if status >= 300:
                body = b"".join([piece async for piece in connection.read_body(headers)])
                raise RefusedError(status, body[:_ERROR_BYTES].decode("utf-8", "replace"))
            if on_head is not None:
                on_head(headers)
            async for piece in connection.read_body(headers):
                yield piece
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError) as error:
            raise CutError("the connection ended within the answer") from error
        except ValueError as error:
            raise CutError(f"the answer is no HTTP: {error}") from error
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()

    async def _ask(self, request: bytes) -> tuple[_Connection, int, dict[str, str]]:
        """Send a request and read the head of its answer. A kept connection may have been closed
        by the server meanwhile: then on a new one."""
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                connection.send(request)
                return connection, *await connection.read_head()
            except (CutError, ConnectionError) as error:
                connection.close()
                if not kept:
                    raise CutError("the connection ended without an answer") from error
            except BaseException:
                connection.close()
                raise

    async def _connect(self) -> _Connection:
        address = self.address
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=self._ssl, limit=_LINE_LIMIT
        )
        return _Connection(reader, writer)


def _field_of(event: bytes, name: bytes) -> bytes:
    """The lines of one field of an event, joined as the standard says."""
    mark = name + b":"
    lines = [line.removeprefix(mark) for line in event.split(b"\n") if line.startswith(mark)]
    return b"\n".join([line.removeprefix(b" ") for line in lines])
