"""A TCP proxy that can stop carrying bytes, cut what is open, and go on: partitions for tests."""

from __future__ import annotations

import asyncio


class TcpProxy:
    """Carries connections to `target` (host:port). Run it in the test's loop."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.num_connections = 0
        self.num_swallowed = 0

    async def start(self) -> str:
        """Listen; the endpoint."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def blackhole(self) -> None:
        """Keep everything open, take new connections, carry nothing."""
        self._flows.clear()

    def heal(self) -> None:
        """What was held back is lost with its connections; new ones work."""
        self._flows.set()
        self.cut()

    def cut(self) -> None:
        """Reset what is open."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        """The end."""
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader, writer):
        self._tasks.add(task := asyncio.current_task())
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        self._writers.add(writer)
        other = None
        try:
            await self._flows.wait()
            there, other = await asyncio.open_connection(*self._target)
            self._writers.add(other)
            await asyncio.gather(self._carry(reader, other), self._carry(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # it was cut, or there is nobody, or the test is over
        finally:
            for one in (writer, other):
                if one is not None:
                    self._writers.discard(one)
                    one.close()

    async def _carry(self, reader, writer):
        while data := await reader.read(1 << 16):
            if not self._flows.is_set():
                self.num_swallowed += len(data)
                await self._flows.wait()
            writer.write(data)
            await writer.drain()
        writer.close()
