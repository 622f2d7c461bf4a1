"""The memory that a node's processes share for KV blocks: a memfd with no name anywhere.

The daemon owns it; a peer of the same user maps it through /proc/<pid>/fd/<fd>. Its size is
sealed, so no peer can make another's view fault. Every access is bounds-checked here. Peers are
trusted not to write where they reserved nothing, and a reader checks what it read all the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
from collections.abc import Sequence

from xllm.errors import BrokenError, ClosedError, InvalidRequestError

CHECKSUM_BYTES = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PATH = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,7}")


def block_checksum(block: bytes | bytearray | memoryview) -> bytes:
    """16 bytes of BLAKE2b over a block's bytes."""
    return hashlib.blake2b(block, digest_size=CHECKSUM_BYTES).digest()


class ArenaView:
    """A mapped arena, whoever owns it. Closing waits for nobody: copies are handed out only."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of a range. InvalidRequestError out of bounds."""
        self._check(offset, num_bytes)
        return self._map[offset : offset + num_bytes]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at an offset. InvalidRequestError out of bounds."""
        with memoryview(data).cast("B") as view:
            self._check(offset, len(view))
            self._map[offset : offset + len(view)] = view

    def close(self) -> None:
        """Unmap. Closing again does nothing."""
        self._map.close()

    def _check(self, offset: int, num_bytes: int) -> None:
        if self._map.closed:
            raise ClosedError("the arena is closed")
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size_bytes:
            raise InvalidRequestError(
                f"bytes {offset} to {offset + num_bytes} of an arena of {self.size_bytes}",
                param="offset",
            )


class Arena:
    """An arena that this process owns. Pages take memory when they are first written."""

    def __init__(self, size_bytes: int) -> None:
        self._fd = os.memfd_create("xllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, size_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        self.view = ArenaView(self._fd, size_bytes)

    @property
    def path(self) -> str:
        """Where a peer of the same user opens it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Unmap and close; the memory lives until the last peer unmaps it."""
        if self._fd >= 0:
            self.view.close()
            os.close(self._fd)
            self._fd = -1


def open_arena(path: str, size_bytes: int) -> ArenaView:
    """Map another process's arena. BrokenError: it is gone, or is not what it should be."""
    if not _PATH.fullmatch(path):
        raise BrokenError(f"{path!r} is no arena's path")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BrokenError(f"cannot open the arena at {path}: {error.strerror}") from error
    try:
        state = os.fstat(fd)
        if state.st_uid != os.geteuid() or state.st_size != size_bytes or size_bytes <= 0:
            raise BrokenError(f"the arena at {path} is not ours or has another size")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise BrokenError(f"the arena at {path} is not sealed")
        return ArenaView(fd, size_bytes)
    except OSError as error:
        raise BrokenError(f"cannot map the arena at {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def write_blocks(arena: ArenaView, todo: Sequence[tuple[int, bytes | memoryview]]) -> bytes:
    """Write blocks at their offsets: their checksums, concatenated."""
    checksums = []
    for offset, block in todo:
        arena.write(offset, block)
        checksums.append(block_checksum(block))
    return b"".join(checksums)


def read_blocks(
    arena: ArenaView, offsets: Sequence[int], checksums: bytes, block_bytes: int
) -> list[bytes]:
    """The leading blocks that are there (offset >= 0) and have their checksums."""
    blocks: list[bytes] = []
    for index, offset in enumerate(offsets):
        if offset < 0:
            break
        block = arena.read(offset, block_bytes)
        start = index * CHECKSUM_BYTES
        if block_checksum(block) != checksums[start : start + CHECKSUM_BYTES]:
            break
        blocks.append(block)
    return blocks
