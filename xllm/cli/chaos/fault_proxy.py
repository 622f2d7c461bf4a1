"""A connection's bad day: a proxy for TCP and unix sockets that delays, cuts, and goes silent.

It stands between two processes and passes bytes on, both ways, until told otherwise. It knows
nothing of what they say. A silent direction keeps its bytes and passes them on when it heals, as
a network's retransmissions would; nothing is ever dropped from the middle of a connection that
lives. Each fault that it carried out is counted, which is its proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import socket
import struct
from collections import deque
from collections.abc import Callable

_CHUNK = 1 << 16
_END = b""
"""Stands behind the last bytes of a direction."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: closing sends a reset instead of the rest."""


@dataclasses.dataclass
class Direction:
    """What happens to the bytes of one direction. `up`: to the one who listens behind the proxy;
    `down`: back."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Half of the width of a uniform distribution around `delay_s`."""
    silent: bool = False
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    num_corrupt: int = 0
    """So many of the next chunks get one wrong byte."""


class FaultProxy:
    """Listens at `endpoint` for connections to what `target` gives for each of them (both
    ipc://PATH or tcp://HOST:PORT; port 0 takes any free one)."""

    def __init__(self, endpoint: str, rng: random.Random, target: Callable[[], str] = str) -> None:
        self.endpoint = endpoint
        self.target = target
        self.up = Direction()
        self.down = Direction()
        self.refuses = False
        """New connections are closed at once."""
        self.num_connections = 0
        self.num_cut = 0
        self.num_refused = 0
        self.num_held = 0
        """Chunks that a silent direction kept."""
        self.num_corrupted = 0
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Connections that are passed on now."""
        return len(self._links)

    async def start(self) -> None:
        """Listen."""
        scheme, _, rest = self.endpoint.partition("://")
        if scheme == "ipc":
            self._server = await asyncio.start_unix_server(self._accept, rest)
            return
        host, _, port = rest.rpartition(":")
        self._server = await asyncio.start_server(self._accept, host, int(port))
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"tcp://{host}:{port}"

    async def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- faults --------------------------------------------------------------------------------

    def cut(self, *, refuse: bool = False) -> int:
        """Reset every connection; with `refuse`, new ones, too. Returns how many were cut."""
        self.refuses = refuse
        links = list(self._links)
        for link in links:
            link.reset()
        self.num_cut += len(links)
        return len(links)

    def silence(self, *, up: bool = True, down: bool = True) -> None:
        """Pass nothing on in these directions."""
        self.up.silent |= up
        self.down.silent |= down

    def half_open(self) -> int:
        """The one behind is gone, and the one in front never hears of it."""
        links = list(self._links)
        for link in links:
            link.drop_target()
        self.num_cut += len(links)
        return len(links)

    def heal(self) -> None:
        """From now on everything is passed on at once; what was kept goes first."""
        self.refuses = False
        self.up = Direction()
        self.down = Direction()

    # -- connections ---------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            self.num_refused += 1
            writer.close()
            return
        try:
            behind, behind_writer = await _connect(self.target())
        except OSError:
            self.num_refused += 1
            writer.close()
            return
        self.num_connections += 1
        link = _Link(writer, behind_writer)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(reader, behind_writer, "up", link),
                self._pump(behind, writer, "down", link),
            )
        finally:
            self._links.discard(link)
            await link.wait_closed()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: str,
        link: _Link,
    ) -> None:
        """Pass on one direction; the end of either side ends both, unless the link is half open."""
        kept: deque[tuple[float, bytes]] = deque()
        more = asyncio.Event()
        sender = asyncio.get_running_loop().create_task(self._send(kept, more, writer, way, link))
        loop = asyncio.get_running_loop()
        due = 0.0
        try:
            while data := await reader.read(_CHUNK):
                state = self._direction(way)
                wait_s = state.delay_s
                if state.jitter_s:
                    wait_s += self._rng.uniform(-state.jitter_s, state.jitter_s)
                # Jitter must not turn round what came in order.
                due = max(due, loop.time() + max(0.0, wait_s))
                self.num_held += state.silent
                kept.append((due, self._spoil(data, state)))
                more.set()
        except OSError:
            pass  # the peer's reset is an end like any other
        finally:
            kept.append((due, _END))
            more.set()
            try:
                await sender  # what came before the end goes before it
            finally:
                sender.cancel()
            if not link.is_half:
                link.close()

    async def _send(
        self,
        kept: deque[tuple[float, bytes]],
        more: asyncio.Event,
        writer: asyncio.StreamWriter,
        way: str,
        link: _Link,
    ) -> None:
        loop = asyncio.get_running_loop()
        while not link.is_reset:
            while not kept:
                more.clear()
                await more.wait()
            state = self._direction(way)
            due, data = kept[0]
            if state.silent or due > loop.time():
                await asyncio.sleep(0.005 if state.silent else max(0.0, due - loop.time()))
                continue
            if not data:
                return
            writer.write(data)
            kept.popleft()
            try:
                await writer.drain()
            except OSError:
                return
            if state.bytes_per_s:
                await asyncio.sleep(len(data) / state.bytes_per_s)

    def _direction(self, way: str) -> Direction:
        return self.up if way == "up" else self.down

    def _spoil(self, data: bytes, state: Direction) -> bytes:
        if not state.num_corrupt:
            return data
        state.num_corrupt -= 1
        self.num_corrupted += 1
        at = self._rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self._rng.randrange(8))]) + data[at + 1 :]


class _Link:
    """The two sides of one connection."""

    def __init__(self, front: asyncio.StreamWriter, behind: asyncio.StreamWriter) -> None:
        self._front = front
        self._behind = behind
        self.is_half = False
        self.is_reset = False

    def close(self) -> None:
        """Close both sides."""
        for writer in (self._front, self._behind):
            writer.close()

    async def wait_closed(self) -> None:
        """Close both sides, and return when they are."""
        self.close()
        for writer in (self._front, self._behind):
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def drop_target(self) -> None:
        """Close the side behind the proxy only."""
        self.is_half = True
        self._behind.close()

    def reset(self) -> None:
        """Close both at once, unsent bytes and all."""
        self.is_reset = True
        for writer in (self._front, self._behind):
            if writer.is_closing():
                continue
            found = writer.get_extra_info("socket")
            if found is not None and found.family != socket.AF_UNIX:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


async def _connect(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    scheme, _, rest = target.partition("://")
    if scheme == "ipc":
        return await asyncio.open_unix_connection(rest)
    host, _, port = rest.rpartition(":")
    return await asyncio.open_connection(host, int(port))
