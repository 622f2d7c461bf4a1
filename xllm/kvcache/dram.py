"""The DRAM tier: which blocks are where in the arena, and who holds them. Pure.

A block is found under (content hash, layout). It is reserved by one peer (being written), then
stored, then perhaps pinned by peers (being read); what is stored and not pinned may be evicted,
least recently used first. It never touches the bytes, and knows no clock and no socket.

The blocks of one call are a chain, and a chain without its head is worthless: the last of a call
count as less recently used than the first, so that eviction eats chains from their ends.
Invariant: every byte of the arena is free or belongs to exactly one block.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Sequence

from xllm.errors import InvalidRequestError, InvariantError
from xllm.kvcache.arena import CHECKSUM_BYTES
from xllm.kvcache.digest import digest_of, hash_key
from xllm.kvcache.ranges import FreeRanges, aligned

MAX_LAYOUTS = 64
MAX_PEERS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class DramStatistics:
    """A snapshot of the tier's counts."""

    num_blocks: int
    num_reserved: int
    num_pinned: int
    used_bytes: int
    capacity_bytes: int
    num_peers: int
    num_stored_total: int
    num_evicted_total: int
    num_dropped_total: int
    num_refused_total: int


class _Block:
    """One block's place and holders. `writer` is set while it is reserved; `dropped` once it may
    not be found any more but readers still hold it."""

    __slots__ = ("checksum", "dropped", "key", "offset", "pins", "writer")

    def __init__(self, key: tuple[bytes, str], offset: int, writer: bytes) -> None:
        self.key = key
        self.offset = offset
        self.writer: bytes | None = writer
        self.checksum = b""
        self.pins = 0
        self.dropped = False


class _Peer:
    """What one peer holds."""

    __slots__ = ("layout", "pins", "reserved")

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.reserved: set[bytes] = set()
        self.pins: dict[bytes, list[_Block]] = {}


class DramTier:
    """The blocks of an arena of `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self._ranges = FreeRanges(capacity_bytes)
        self._layouts: dict[str, int] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._blocks: dict[tuple[bytes, str], _Block] = {}
        self._idle: OrderedDict[tuple[bytes, str], _Block] = OrderedDict()
        self._holders: dict[bytes, int] = {}
        self._touched: dict[bytes, bool] = {}
        self._num_lingering = 0
        self.digest = 0
        """Of the stored hashes, see `digest`."""
        self._num_stored = self._num_evicted = self._num_dropped = self._num_refused = 0

    def open(self, peer: bytes, layout: str, block_bytes: int) -> None:
        """A peer says the layout of its blocks. Opening again gives up what it held.

        InvalidRequestError: a block larger than the tier, a layout known with another size."""
        if not 0 < block_bytes <= self._ranges.size_bytes:
            raise InvalidRequestError(
                f"block_bytes must be 1 to {self._ranges.size_bytes}, not {block_bytes}",
                param="block_bytes",
            )
        known = self._layouts.get(layout)
        if known is not None and known != block_bytes:
            raise InvalidRequestError(
                f"blocks of layout {layout} have {known} bytes, not {block_bytes}",
                param="block_bytes",
            )
        if known is None and len(self._layouts) >= MAX_LAYOUTS:
            raise InvalidRequestError(f"{MAX_LAYOUTS} layouts are the most", param="layout")
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            raise InvalidRequestError(f"{MAX_PEERS} peers are the most", param="peer")
        self.close(peer)
        self._layouts[layout] = block_bytes
        self._peers[peer] = _Peer(layout)

    def close(self, peer: bytes) -> None:
        """The peer is gone: its reservations and pins with it."""
        held = self._peers.pop(peer, None)
        if held is None:
            return
        for content_hash in held.reserved:
            self._forget(self._blocks[content_hash, held.layout])
        for blocks in held.pins.values():
            for block in blocks:
                self._unpin(block)

    def look_up(self, peer: bytes, hashes: Sequence[bytes]) -> int:
        """How many of the blocks, from the first on, are stored."""
        layout = self._peer(peer).layout
        count = 0
        for content_hash in hashes:
            block = self._blocks.get((content_hash, layout))
            if block is None or block.writer is not None:
                break
            count += 1
        return count

    def reserve(self, peer: bytes, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """Offsets to write the blocks at; -1 for those that are known (or being written by
        anybody), and for the rest from the first on that finds no room."""
        held = self._peer(peer)
        num_bytes = self._layouts[held.layout]
        offsets = []
        full = False
        for content_hash in hashes:
            key = (content_hash, held.layout)
            offset = None
            if key not in self._blocks and not full:
                offset = self._make_room(num_bytes)
                full = offset is None
            if offset is None:
                self._num_refused += full
                offsets.append(-1)
                continue
            self._blocks[key] = _Block(key, offset, peer)
            held.reserved.add(content_hash)
            offsets.append(offset)
        return tuple(offsets)

    def commit(self, peer: bytes, hashes: Sequence[bytes], checksums: Sequence[bytes]) -> int:
        """The blocks are written: how many of them this peer had reserved, now stored."""
        held = self._peer(peer)
        count = 0
        for content_hash, checksum in reversed(tuple(zip(hashes, checksums, strict=True))):
            if content_hash not in held.reserved:
                continue
            held.reserved.remove(content_hash)
            block = self._blocks[content_hash, held.layout]
            block.writer = None
            block.checksum = checksum
            self._idle[block.key] = block
            self._count_holder(content_hash, 1)
            count += 1
        self._num_stored += count
        return count

    def pin(self, peer: bytes, hashes: Sequence[bytes]) -> tuple[tuple[int, bytes], ...]:
        """(offset, checksum) of each block, kept there until released; (-1, zeros) if absent."""
        held = self._peer(peer)
        places = []
        for content_hash in reversed(hashes):
            block = self._blocks.get((content_hash, held.layout))
            if block is None or block.writer is not None:
                places.append((-1, bytes(CHECKSUM_BYTES)))
                continue
            self._idle.pop(block.key, None)
            block.pins += 1
            held.pins.setdefault(content_hash, []).append(block)
            places.append((block.offset, block.checksum))
        places.reverse()
        return tuple(places)

    def release(self, peer: bytes, hashes: Sequence[bytes]) -> int:
        """Undo one pin of each block, or give up its reservation: how many there were."""
        held = self._peer(peer)
        count = 0
        for content_hash in reversed(hashes):
            pinned = held.pins.get(content_hash)
            if pinned:
                self._unpin(pinned.pop())
                if not pinned:
                    del held.pins[content_hash]
            elif content_hash in held.reserved:
                held.reserved.remove(content_hash)
                self._forget(self._blocks[content_hash, held.layout])
            else:
                continue
            count += 1
        return count

    def drop(self, peer: bytes, hashes: Sequence[bytes]) -> int:
        """The blocks are bad: not found from now on, freed when the last reader lets go."""
        layout = self._peer(peer).layout
        count = 0
        for content_hash in hashes:
            block = self._blocks.get((content_hash, layout))
            if block is None or block.writer is not None:
                continue
            self._remove_stored(block)
            count += 1
        self._num_dropped += count
        return count

    def take_events(self) -> tuple[bytes, bytes]:
        """Concatenated hashes that are (stored, removed) now and were not the last time."""
        stored: list[bytes] = []
        removed: list[bytes] = []
        for content_hash, was_there in self._touched.items():
            is_there = content_hash in self._holders
            if is_there != was_there:
                (stored if is_there else removed).append(content_hash)
        self._touched.clear()
        return b"".join(stored), b"".join(removed)

    def stored_hashes(self) -> bytes:
        """All hashes stored under any layout, concatenated."""
        return b"".join(self._holders)

    @property
    def num_hashes(self) -> int:
        """Distinct hashes that are stored."""
        return len(self._holders)

    def statistics(self) -> DramStatistics:
        """A snapshot of the counts."""
        num_reserved = sum(len(peer.reserved) for peer in self._peers.values())
        return DramStatistics(
            num_blocks=len(self._blocks) - num_reserved,
            num_reserved=num_reserved,
            num_pinned=len(self._blocks) - num_reserved - len(self._idle) + self._num_lingering,
            used_bytes=self._ranges.size_bytes - self._ranges.free_bytes,
            capacity_bytes=self._ranges.size_bytes,
            num_peers=len(self._peers),
            num_stored_total=self._num_stored,
            num_evicted_total=self._num_evicted,
            num_dropped_total=self._num_dropped,
            num_refused_total=self._num_refused,
        )

    def check(self) -> None:
        """Raise InvariantError if places, pins, reservations and events do not fit together."""
        self._ranges.check()
        pins: dict[int, int] = {}
        blocks = {id(block): block for block in self._blocks.values()}
        for peer in self._peers.values():
            for pinned in peer.pins.values():
                for block in pinned:
                    pins[id(block)] = pins.get(id(block), 0) + 1
                    blocks[id(block)] = block
        used = sorted((b.offset, aligned(self._layouts[b.key[1]])) for b in blocks.values())
        if sum(size for _, size in used) + self._ranges.free_bytes != self._ranges.size_bytes:
            raise InvariantError(f"{used} and {self._ranges.free_bytes} free bytes do not add up")
        for (offset, size), (following, _) in itertools.pairwise(used):
            if offset + size > following:
                raise InvariantError(f"blocks at {offset} and {following} overlap")
        stored: dict[bytes, int] = {}
        for block in blocks.values():
            if block.pins != pins.get(id(block), 0):
                raise InvariantError(f"block at {block.offset}: {block.pins} pins of {pins}")
            if block.dropped:
                continue
            content_hash, layout = block.key
            idle = block.writer is None and not block.pins
            if idle != (block.key in self._idle):
                raise InvariantError(f"block at {block.offset} is idle: {idle}")
            if block.writer is None:
                stored[content_hash] = stored.get(content_hash, 0) + 1
                continue
            writer = self._peers.get(block.writer)
            if writer is None or content_hash not in writer.reserved or writer.layout != layout:
                raise InvariantError(f"block at {block.offset} has a writer who is gone")
        if stored != self._holders:
            raise InvariantError("the hashes that are told are not those that are stored")
        if digest_of(self.stored_hashes()) != self.digest:
            raise InvariantError("the digest is not that of what is stored")

    def _peer(self, peer: bytes) -> _Peer:
        held = self._peers.get(peer)
        if held is None:
            raise InvalidRequestError("the arena was not opened by this peer", param="peer")
        return held

    def _make_room(self, num_bytes: int) -> int | None:
        while True:
            offset = self._ranges.allocate(num_bytes)
            if offset is not None or not self._idle:
                return offset
            self._remove_stored(next(iter(self._idle.values())))
            self._num_evicted += 1

    def _unpin(self, block: _Block) -> None:
        block.pins -= 1
        if block.pins:
            return
        if block.dropped:
            self._num_lingering -= 1
            self._ranges.free(block.offset, self._layouts[block.key[1]])
        else:
            self._idle[block.key] = block

    def _remove_stored(self, block: _Block) -> None:
        """A stored block is not found any more; readers may still hold its bytes."""
        self._count_holder(block.key[0], -1)
        if block.pins:
            block.dropped = True
            self._num_lingering += 1
            del self._blocks[block.key]
        else:
            del self._idle[block.key]
            self._forget(block)

    def _forget(self, block: _Block) -> None:
        del self._blocks[block.key]
        self._ranges.free(block.offset, self._layouts[block.key[1]])

    def _count_holder(self, content_hash: bytes, change: int) -> None:
        count = self._holders.get(content_hash, 0)
        self._touched.setdefault(content_hash, count > 0)
        if not count or not count + change:
            self.digest ^= hash_key(content_hash)
        if count + change:
            self._holders[content_hash] = count + change
        else:
            del self._holders[content_hash]
