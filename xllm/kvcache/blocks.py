"""The pool of KV blocks: who holds which block how often, and which are free.

Decides nothing but which free block is next. Knows no tokens, hashes or sequences. Invariant: a
block is in the free list if and only if nobody holds it and nobody keeps its content; each block
is in the free list at most once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from xllm.errors import InvariantError


@dataclasses.dataclass(frozen=True, slots=True)
class BlockPoolStatistics:
    """Blocks by state: `num_free` are empty, `num_held` have at least one holder, and
    `num_kept` have no holder but a content that somebody keeps."""

    num_blocks: int
    num_free: int
    num_held: int
    num_kept: int


class BlockPool:
    """A fixed number of blocks, 0 to num_blocks - 1, with a count of holders each."""

    __slots__ = ("_free", "_kept", "_refs", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` >= 1."""
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept = 0

    @property
    def num_free(self) -> int:
        """Empty blocks: what `take` can give at once."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """Blocks without a holder that are not in the free list."""
        return self._kept

    def refs(self, block_id: int) -> int:
        """Holders of a block."""
        return self._refs[block_id]

    def take(self) -> int:
        """A free block, now with one holder. Mutates. There must be one (see `num_free`)."""
        block_id = self._free.pop()
        self._refs[block_id] = 1
        return block_id

    def share(self, block_id: int) -> bool:
        """One more holder of a held or kept block. Mutates. True if it was only kept before."""
        refs = self._refs[block_id]
        self._refs[block_id] = refs + 1
        if refs == 0:
            self._kept -= 1
            return True
        return False

    def drop(self, block_id: int) -> bool:
        """One holder less. Mutates. True if that was the last one: the block is then kept, until
        the caller shares it again or gives it back."""
        refs = self._refs[block_id] - 1
        if refs < 0:
            raise InvariantError(f"block {block_id} was dropped once more than it was held")
        self._refs[block_id] = refs
        if refs == 0:
            self._kept += 1
            return True
        return False

    def give_back(self, block_id: int) -> None:
        """A kept block becomes free: its content is gone. Mutates."""
        if self._refs[block_id] != 0:
            raise InvariantError(f"block {block_id} was given back while it is held")
        self._kept -= 1
        self._free.append(block_id)

    def statistics(self) -> BlockPoolStatistics:
        """A snapshot; does not mutate."""
        num_free = len(self._free)
        num_held = self.num_blocks - num_free - self._kept
        return BlockPoolStatistics(self.num_blocks, num_free, num_held, self._kept)

    def check(self, holders: Iterable[int] | None = None) -> None:
        """Raise InvariantError where the counts contradict each other.

        `holders`: if given, every block id as often as somebody believes to hold it."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise InvariantError("a block is in the free list twice")
        for block_id in free:
            if self._refs[block_id] != 0:
                raise InvariantError(f"free block {block_id} has {self._refs[block_id]} holders")
        num_idle = sum(1 for refs in self._refs if refs == 0)
        if num_idle != len(free) + self._kept:
            raise InvariantError(
                f"{num_idle} blocks without holder, but {len(free)} free and {self._kept} kept"
            )
        if holders is None:
            return
        counts = [0] * self.num_blocks
        for block_id in holders:
            counts[block_id] += 1
        if counts != self._refs:
            wrong = [
                (block_id, refs, counts[block_id])
                for block_id, refs in enumerate(self._refs)
                if refs != counts[block_id]
            ]
            raise InvariantError(f"(block, holders counted, holders known): {wrong[:8]}")
