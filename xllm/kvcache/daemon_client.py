"""The engine's side of the KV cache daemon: look up, put, get, where every trouble is a miss.

No call raises because of the daemon and none takes longer than `timeout_s` (moving the bytes
aside): a daemon that is gone, hangs or refuses makes every look-up a miss, and is tried again in
the background. It decides nothing about what to store. Invariant: bytes handed out by `get` have
the checksum that their writer gave.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

import structlog

from xllm.errors import InvalidRequestError, TransportError, XllmError
from xllm.kvcache.arena import CHECKSUM_BYTES, ArenaView, open_arena, read_blocks, write_blocks
from xllm.kvcache.hashing import HASH_BYTES
from xllm.protocol.cache import (
    ArenaOpened,
    BlockPlaces,
    BlocksFound,
    CacheDone,
    CacheReply,
    CacheRequest,
    CommitBlocks,
    DropBlocks,
    LookUpBlocks,
    OpenArena,
    PinBlocks,
    ReleaseBlocks,
    ReserveBlocks,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

_log = structlog.get_logger("kvcache")
_THREAD_BYTES = 256 << 10
"""More bytes than this are copied and checked in a thread, not in the loop."""

R = TypeVar("R", ArenaOpened, BlocksFound, BlockPlaces, CacheDone)


@dataclasses.dataclass(frozen=True, slots=True)
class CacheClientStatistics:
    """Counts since the client was made."""

    attached: bool
    num_put: int
    num_got: int
    num_missed_calls: int
    num_bad_blocks: int
    num_attaches: int


class CacheClient:
    """A connection of one engine to its node's daemon. Make it inside the running loop.

    `layout` says all that the bytes of a block depend on beside its content hash: dtype, memory
    layout, parallel sizes. Hashes are concatenated content hashes, 32 bytes each."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        *,
        peer: str,
        layout: str,
        block_bytes: int,
        timeout_s: float = 0.1,
        retry_s: float = 0.5,
        server_key: str = "",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._peer = peer
        self._layout = layout
        self._block_bytes = block_bytes
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[CacheReply]] = {}
        self._arena: ArenaView | None = None
        self._attached = asyncio.Event()
        self._lost = asyncio.Event()
        self._closed = False
        self._num_put = self._num_got = self._num_missed = self._num_bad = 0
        self._num_attaches = 0
        self._socket: DealerSocket[CacheReply] = DealerSocket(
            transport,
            endpoint,
            Decoder(CacheReply),
            self._on_message,
            on_gone=self._detach,
            on_connected=self._lost.set,
            server_key=server_key,
            name="kvcache client",
        )
        self._attaching = self._loop.create_task(self._stay_attached(), name="kvcache attach")

    @property
    def attached(self) -> bool:
        """Whether the daemon is there; else every look-up is a miss."""
        return self._arena is not None

    async def wait_attached(self, timeout_s: float) -> bool:
        """Whether the daemon was there within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._attached.wait()
        except TimeoutError:
            return False
        return True

    async def look_up(self, hashes: bytes) -> int:
        """How many of these chained blocks, from the first on, the daemon has."""
        answer = await self._ask(LookUpBlocks(next(self._ids), hashes), BlocksFound)
        return answer.num_dram if answer is not None else 0

    async def put(self, hashes: bytes, blocks: Sequence[bytes | memoryview]) -> int:
        """Store the blocks that are not there yet: how many were stored.

        InvalidRequestError: hashes and blocks do not fit, a block has the wrong size."""
        names = self._split(hashes)
        if len(names) != len(blocks):
            raise InvalidRequestError(f"{len(blocks)} blocks of {len(names)} hashes")
        for block in blocks:
            if memoryview(block).nbytes != self._block_bytes:
                raise InvalidRequestError(
                    f"a block has {self._block_bytes} bytes, not {memoryview(block).nbytes}"
                )
        places = await self._ask(ReserveBlocks(next(self._ids), hashes), BlockPlaces)
        arena = self._arena
        if places is None or arena is None or len(places.offsets) != len(names):
            return 0
        mine = [index for index, offset in enumerate(places.offsets) if offset >= 0]
        if not mine:
            return 0
        reserved = b"".join(names[index] for index in mine)
        todo = [(places.offsets[index], blocks[index]) for index in mine]
        try:
            checksums = await self._write(arena, todo)
        except XllmError as error:
            _log.warning("kvcache_write_failed", error=error.message)
            await self._ask(ReleaseBlocks(next(self._ids), reserved), CacheDone)
            return 0
        commit = CommitBlocks(next(self._ids), reserved, checksums)
        done = await self._ask(commit, CacheDone)
        stored = done.num_blocks if done is not None else 0
        self._num_put += stored
        return stored

    async def get(self, hashes: bytes) -> list[bytes]:
        """The bytes of the leading blocks that are there and whole; maybe none."""
        names = self._split(hashes)
        places = await self._ask(PinBlocks(next(self._ids), hashes), BlockPlaces)
        arena = self._arena
        if places is None or arena is None or len(places.offsets) != len(names):
            return []
        if len(places.checksums) != len(names) * CHECKSUM_BYTES:
            return []
        found = [index for index, offset in enumerate(places.offsets) if offset >= 0]
        blocks: list[bytes] = []
        try:
            blocks = await self._read(arena, places)
        except XllmError as error:
            _log.warning("kvcache_read_failed", error=error.message)
        finally:
            self._say(ReleaseBlocks(next(self._ids), b"".join(names[index] for index in found)))
        if len(blocks) < len(names) and places.offsets[len(blocks)] >= 0:
            self._num_bad += 1
            _log.warning("kvcache_bad_block", layout=self._layout)
            self._say(DropBlocks(next(self._ids), names[len(blocks)]))
        self._num_got += len(blocks)
        return blocks

    def statistics(self) -> CacheClientStatistics:
        """Counts since the client was made."""
        return CacheClientStatistics(
            attached=self.attached,
            num_put=self._num_put,
            num_got=self._num_got,
            num_missed_calls=self._num_missed,
            num_bad_blocks=self._num_bad,
            num_attaches=self._num_attaches,
        )

    async def close(self) -> None:
        """Let go of the daemon. Calls from now on are misses."""
        if self._closed:
            return
        self._closed = True
        self._attaching.cancel()
        await asyncio.gather(self._attaching, return_exceptions=True)
        self._detach()
        self._socket.close()

    # -- attaching -----------------------------------------------------------------------------

    async def _stay_attached(self) -> None:
        """Open the arena whenever it is not open."""
        while True:
            if self._arena is None:
                await self._attach()
            if self._arena is not None:
                self._lost.clear()
            try:
                # Also without word of a loss: a daemon may hang, and calls detach from it.
                async with asyncio.timeout(self._retry_s):
                    await self._lost.wait()
                self._lost.clear()
            except TimeoutError:
                pass  # look again

    async def _attach(self) -> None:
        request = OpenArena(next(self._ids), self._peer, self._layout, self._block_bytes)
        opened = await self._call(request, ArenaOpened)
        if opened is None:
            return
        try:
            self._arena = open_arena(opened.path, opened.size_bytes)
        except XllmError as error:
            _log.warning("kvcache_arena_unusable", error=error.message)
            return
        self._num_attaches += 1
        self._attached.set()

    def _detach(self) -> None:
        if self._arena is not None:
            # Unmapped when the last copy in flight lets go of it, not under its feet.
            self._arena = None
        self._attached.clear()
        for future in self._waiting.values():
            if not future.done():
                future.cancel()
        if not self._socket.connected:
            self._socket.discard_queued()

    # -- asking --------------------------------------------------------------------------------

    async def _ask(self, request: CacheRequest, kind: type[R]) -> R | None:
        """The answer, or None for every kind of trouble."""
        if self._arena is None:
            self._num_missed += 1
            return None
        answer = await self._call(request, kind)
        if answer is None:
            self._num_missed += 1
        return answer

    async def _call(self, request: CacheRequest, kind: type[R]) -> R | None:
        future: asyncio.Future[CacheReply] = self._loop.create_future()
        self._waiting[request.id] = future
        try:
            self._socket.send(request)
            await asyncio.wait((future,), timeout=self._timeout_s)
        except TransportError:
            return None
        finally:
            del self._waiting[request.id]
        if not future.done():
            self._detach()  # it hangs: no further call waits for it until it answers again
            return None
        if future.cancelled():
            return None
        reply = future.result()
        if not isinstance(reply, kind):
            _log.warning("kvcache_refused", reply=repr(reply)[:200])
            return None
        return reply

    def _say(self, request: CacheRequest) -> None:
        """Send without waiting for the answer."""
        if self._arena is None:
            return
        try:
            self._socket.send(request)
        except TransportError:
            self._detach()

    def _on_message(self, message: CacheReply, frames: list[bytes]) -> None:
        future = self._waiting.get(message.id)
        if future is not None and not future.done():
            future.set_result(message)

    # -- bytes ---------------------------------------------------------------------------------

    def _split(self, hashes: bytes) -> list[bytes]:
        if len(hashes) % HASH_BYTES:
            raise InvalidRequestError(f"{len(hashes)} bytes of hashes", param="hashes")
        return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]

    async def _write(
        self, arena: ArenaView, todo: Sequence[tuple[int, bytes | memoryview]]
    ) -> bytes:
        if len(todo) * self._block_bytes > _THREAD_BYTES:
            return await asyncio.to_thread(write_blocks, arena, todo)
        return write_blocks(arena, todo)

    async def _read(self, arena: ArenaView, places: BlockPlaces) -> list[bytes]:
        if len(places.offsets) * self._block_bytes > _THREAD_BYTES:
            return await asyncio.to_thread(
                read_blocks, arena, places.offsets, places.checksums, self._block_bytes
            )
        return read_blocks(arena, places.offsets, places.checksums, self._block_bytes)
