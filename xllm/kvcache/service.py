"""What a KV cache daemon answers: the cache conversation on the DRAM tier. No sockets, no clock.

Every request gets exactly one answer; one that is wrong in form is refused by name and changes
nothing. It knows connections by opaque identities.
"""

from __future__ import annotations

from xllm.errors import InvalidRequestError, XllmError
from xllm.kvcache.arena import CHECKSUM_BYTES
from xllm.kvcache.dram import DramStatistics, DramTier
from xllm.kvcache.hashing import HASH_BYTES
from xllm.protocol.cache import (
    ArenaOpened,
    BlockPlaces,
    BlocksFound,
    CacheDone,
    CacheRefused,
    CacheReply,
    CacheRequest,
    CommitBlocks,
    DropBlocks,
    LookUpBlocks,
    OpenArena,
    PinBlocks,
    PrefetchBlocks,
    ReleaseBlocks,
    ReserveBlocks,
)

MAX_BLOCKS = 16384
"""Blocks of one request."""
MAX_NAME_CHARS = 256


class CacheService:
    """Answers requests on `tier`, whose bytes lie in the arena at `path`."""

    def __init__(self, tier: DramTier, path: str, size_bytes: int) -> None:
        self._tier = tier
        self._path = path
        self._size_bytes = size_bytes
        self._num_refused = 0

    def handle(self, peer: bytes, request: CacheRequest) -> CacheReply:
        """The answer to one request."""
        try:
            if isinstance(request, OpenArena):
                return self._open(peer, request)
            return self._answer(peer, request)
        except XllmError as error:
            self._num_refused += 1
            return CacheRefused(request.id, error.code, error.message)

    def forget(self, peer: bytes) -> None:
        """The peer is gone, and with it what it had reserved and pinned."""
        self._tier.close(peer)

    def metrics(self) -> bytes:
        """Prometheus text of the tier."""
        return _prometheus(self._tier.statistics(), self._num_refused)

    def _open(self, peer: bytes, request: OpenArena) -> CacheReply:
        if len(request.layout) > MAX_NAME_CHARS or len(request.peer) > MAX_NAME_CHARS:
            raise InvalidRequestError(
                f"names have at most {MAX_NAME_CHARS} characters", param="layout"
            )
        self._tier.open(peer, request.layout, request.block_bytes)
        return ArenaOpened(request.id, self._path, self._size_bytes)

    def _answer(self, peer: bytes, request: CacheRequest) -> CacheReply:
        assert not isinstance(request, OpenArena)
        tier = self._tier
        id = request.id
        hashes = _split(request.hashes, HASH_BYTES, "hashes")
        match request:
            case LookUpBlocks():
                return BlocksFound(id, tier.look_up(peer, hashes))
            case ReserveBlocks():
                return BlockPlaces(id, tier.reserve(peer, hashes))
            case CommitBlocks():
                checksums = _split(request.checksums, CHECKSUM_BYTES, "checksums")
                if len(checksums) != len(hashes):
                    raise InvalidRequestError(
                        f"{len(checksums)} checksums of {len(hashes)} blocks", param="checksums"
                    )
                return CacheDone(id, tier.commit(peer, hashes, checksums))
            case PinBlocks():
                places = tier.pin(peer, hashes)
                offsets = tuple(offset for offset, _ in places)
                return BlockPlaces(id, offsets, b"".join(checksum for _, checksum in places))
            case ReleaseBlocks():
                return CacheDone(id, tier.release(peer, hashes))
            case DropBlocks():
                return CacheDone(id, tier.drop(peer, hashes))
            case PrefetchBlocks():
                # No slower tier yet: what is there is in DRAM already.
                return CacheDone(id, tier.look_up(peer, hashes))


def _split(data: bytes, size: int, param: str) -> list[bytes]:
    if len(data) % size:
        raise InvalidRequestError(f"{len(data)} bytes are no multiple of {size}", param=param)
    if len(data) > MAX_BLOCKS * size:
        raise InvalidRequestError(
            f"{len(data) // size} blocks; a request has at most {MAX_BLOCKS}", param=param
        )
    return [data[start : start + size] for start in range(0, len(data), size)]


def _prometheus(counts: DramStatistics, num_refused: int) -> bytes:
    rows = (
        ("blocks", "gauge", "Blocks stored.", counts.num_blocks),
        ("reserved_blocks", "gauge", "Blocks being written.", counts.num_reserved),
        ("pinned_blocks", "gauge", "Blocks being read.", counts.num_pinned),
        ("used_bytes", "gauge", "Bytes of the arena in use.", counts.used_bytes),
        ("capacity_bytes", "gauge", "Size of the arena.", counts.capacity_bytes),
        ("peers", "gauge", "Engines connected.", counts.num_peers),
        ("stored_blocks_total", "counter", "Blocks stored so far.", counts.num_stored_total),
        ("evicted_blocks_total", "counter", "Blocks that made room.", counts.num_evicted_total),
        ("dropped_blocks_total", "counter", "Blocks found damaged.", counts.num_dropped_total),
        ("unplaced_blocks_total", "counter", "Blocks without room.", counts.num_refused_total),
        ("refused_requests_total", "counter", "Requests wrong in form.", num_refused),
    )
    lines = []
    for row, kind, text, value in rows:
        name = f"xllm_kvcache_dram_{row}"
        lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n")
    return "".join(lines).encode()
