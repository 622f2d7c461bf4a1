"""The toy engine's KV memory: one arena of pages that are really written and read back.

A page is a header (the digest of everything before it) and block_size entries. It knows block
tables and positions, not tokens drawn nor sequences. Invariant: what `read_tail` returns was read
from the arena, never from what was asked to be written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.errors import InvariantError
from xllm.worker.toy.stream import (
    DIGEST_BYTES,
    ENTRY_BYTES,
    ROOT,
    pack_entries,
    pack_entry_into,
    page_digest,
)


@dataclasses.dataclass(frozen=True)
class PageStatistics:
    """Counts since the start."""

    num_blocks: int
    block_size: int
    pages_checked: int
    pages_broken: int
    pages_copied: int


class PageArena:
    """`num_blocks` pages of `block_size` tokens each in one bytearray."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._page_bytes = DIGEST_BYTES + block_size * ENTRY_BYTES
        self._memory = bytearray(num_blocks * self._page_bytes)
        self._checked = 0
        self._broken = 0
        self._copied = 0

    def copy(self, source: int, destination: int) -> None:
        """Copy one whole page."""
        size = self._page_bytes
        self._check_block(source)
        self._check_block(destination)
        content = self._memory[source * size : (source + 1) * size]
        self._memory[destination * size : (destination + 1) * size] = content
        self._copied += 1

    def write(self, table: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """Write tokens at positions from `start` on; a page's first entry brings its header, the
        digest of the page before it as it reads back now."""
        done = 0
        while done < len(tokens):
            index, offset = divmod(start + done, self.block_size)
            count = min(self.block_size - offset, len(tokens) - done)
            base = self._base(table, index)
            if offset == 0:
                header = page_digest(self._page(table, index - 1)) if index else ROOT
                self._memory[base : base + DIGEST_BYTES] = header
            at = base + DIGEST_BYTES + offset * ENTRY_BYTES
            packed = pack_entries(tokens[done : done + count], start + done)
            self._memory[at : at + len(packed)] = packed
            done += count

    def write_one(self, table: Sequence[int], position: int, token: int) -> None:
        """`write` of a single token, for decodes."""
        index, offset = divmod(position, self.block_size)
        if offset == 0:
            self.write(table, position, (token,))
            return
        at = self._base(table, index) + DIGEST_BYTES + offset * ENTRY_BYTES
        pack_entry_into(self._memory, at, token, position)

    def read_tail(self, table: Sequence[int], length: int) -> bytes:
        """Header and entries of the page that holds position length - 1, up to that one."""
        index, offset = divmod(length - 1, self.block_size)
        base = self._base(table, index)
        return bytes(self._memory[base : base + DIGEST_BYTES + (offset + 1) * ENTRY_BYTES])

    def verify_page(self, table: Sequence[int], index: int) -> bool:
        """Whether page `index` is what the header of the page after it says it is."""
        base = self._base(table, index + 1)
        self._checked += 1
        if page_digest(self._page(table, index)) == self._memory[base : base + DIGEST_BYTES]:
            return True
        self._broken += 1
        return False

    def verify_prefix(self, table: Sequence[int], length: int) -> bool:
        """Re-read the whole chain of headers of a cached prefix of `length` tokens."""
        base = self._base(table, 0)
        self._checked += 1
        sound = self._memory[base : base + DIGEST_BYTES] == ROOT
        self._broken += not sound
        for index in range((length - 1) // self.block_size):
            sound = self.verify_page(table, index) and sound
        return sound

    def statistics(self) -> PageStatistics:
        """A snapshot of the counts; `pages_broken` is 0 unless something overwrote pages."""
        return PageStatistics(
            self.num_blocks, self.block_size, self._checked, self._broken, self._copied
        )

    def check(self) -> None:
        """Raise InvariantError if the arena lost its shape."""
        if len(self._memory) != self.num_blocks * self._page_bytes:
            raise InvariantError(f"toy arena: {len(self._memory)} bytes, not as allocated")

    def _page(self, table: Sequence[int], index: int) -> memoryview:
        base = self._base(table, index)
        return memoryview(self._memory)[base : base + self._page_bytes]

    def _base(self, table: Sequence[int], index: int) -> int:
        if not 0 <= index < len(table):
            raise InvariantError(f"toy arena: page {index} of a block table of {len(table)}")
        return self._check_block(table[index]) * self._page_bytes

    def _check_block(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise InvariantError(f"toy arena: block {block} of {self.num_blocks}")
        return block
