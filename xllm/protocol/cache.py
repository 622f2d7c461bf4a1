"""Master, worker and KV cache daemon: look up, reserve, commit, pin, release.

Bulk bytes never travel in a message on one host: the daemon's arena is a memfd that a peer of
the same user maps through /proc/<pid>/fd/<fd>. A store is reserve, write, commit; a load is
pin, read, release. A reservation or pin of a peer that goes away is dropped. Every stored block
carries a checksum, verified by the reader: a block that fails it is a miss, never an error.
"""

from __future__ import annotations

from xllm.protocol.message import ArrayMessage, learn


class OpenArena(ArrayMessage, frozen=True):
    """A peer's first word: who it is and the layout (dtype, block size, parallel sizes) of its
    blocks. Blocks are stored and found under (content hash, layout)."""

    id: int
    peer: str
    layout: str
    block_bytes: int


class LookUpBlocks(ArrayMessage, frozen=True):
    """How many of these chained blocks (concatenated 32-byte hashes), from the first on, are
    here?"""

    id: int
    hashes: bytes


class ReserveBlocks(ArrayMessage, frozen=True):
    """Room for these blocks, to be written by the peer; known hashes are answered -1."""

    id: int
    hashes: bytes


class CommitBlocks(ArrayMessage, frozen=True):
    """The reserved blocks are written; `checksums`: 16 bytes each (BLAKE2b of the bytes)."""

    id: int
    hashes: bytes
    checksums: bytes


class PinBlocks(ArrayMessage, frozen=True):
    """Keep these blocks where they are until released, and say where."""

    id: int
    hashes: bytes


class ReleaseBlocks(ArrayMessage, frozen=True):
    """Undo a pin, or give up a reservation."""

    id: int
    hashes: bytes


class DropBlocks(ArrayMessage, frozen=True):
    """These blocks failed their checksum at a reader: forget them."""

    id: int
    hashes: bytes


class PrefetchBlocks(ArrayMessage, frozen=True):
    """Bring these blocks from slower tiers to DRAM, if they are there."""

    id: int
    hashes: bytes


CacheRequest = (
    OpenArena
    | LookUpBlocks
    | ReserveBlocks
    | CommitBlocks
    | PinBlocks
    | ReleaseBlocks
    | DropBlocks
    | PrefetchBlocks
)


class ArenaOpened(ArrayMessage, frozen=True):
    """Where to map the arena from."""

    id: int
    path: str
    size_bytes: int


class BlocksFound(ArrayMessage, frozen=True):
    """Answer to a look-up: the length of the leading run in each tier."""

    id: int
    num_dram: int
    num_ssd: int = 0


class BlockPlaces(ArrayMessage, frozen=True):
    """Offsets in the arena, one a hash (-1: not there, or not needed); with a pin also the
    checksums, 16 bytes each."""

    id: int
    offsets: tuple[int, ...]
    checksums: bytes = b""


class CacheDone(ArrayMessage, frozen=True):
    """Done; `num_blocks` of them took effect."""

    id: int
    num_blocks: int = 0


class CacheRefused(ArrayMessage, frozen=True):
    """Not done, and why."""

    id: int
    code: str
    message: str


CacheReply = ArenaOpened | BlocksFound | BlockPlaces | CacheDone | CacheRefused

learn(CacheRequest, CacheReply)
