"""The KV blocks of a model: who holds which block how often, and which are only kept.

A block is a page of the device's memory, which several models may share. Decides nothing. Knows
no tokens, hashes or sequences. Invariant: a block is the model's if and only if somebody holds it
or keeps its content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from xllm.errors import InvariantError
from xllm.kvcache.pages import PagePool


@dataclasses.dataclass(frozen=True, slots=True)
class BlockPoolStatistics:
    """Blocks by state: `num_free` are empty, `num_held` have at least one holder, and
    `num_kept` have no holder but a content that somebody keeps."""

    num_blocks: int
    num_free: int
    num_held: int
    num_kept: int


class BlockPool:
    """Blocks 0 to num_blocks - 1 with a count of holders each."""

    __slots__ = ("_kept", "_num_held", "_owner", "_refs", "num_blocks", "pages")

    def __init__(self, num_blocks: int, pages: PagePool | None = None, owner: int = 0) -> None:
        """`num_blocks` >= 1. `pages`: the pool of as many pages that others take from too, as
        other owners; by default the model has one for itself."""
        self.num_blocks = num_blocks
        self.pages = PagePool(num_blocks) if pages is None else pages
        assert self.pages.num_pages == num_blocks
        self._owner = owner
        self._refs = [0] * num_blocks
        self._kept = 0
        self._num_held = 0

    @property
    def num_free(self) -> int:
        """Empty blocks: what `take` can give at once."""
        return self.pages.num_free

    @property
    def num_kept(self) -> int:
        """Blocks without a holder that are not in the free list."""
        return self._kept

    def refs(self, block_id: int) -> int:
        """Holders of a block."""
        return self._refs[block_id]

    def is_free(self, block_id: int) -> bool:
        """Whether `take` can give this block."""
        return self.pages.owner(block_id) < 0

    def take(self, wanted: int = -1, after: int = -1) -> int:
        """A free block, now with one holder: `wanted` if it is free, else if possible the one
        behind `after`. Mutates. There must be one (see `num_free`)."""
        block_id = self.pages.take(self._owner, wanted, after)
        self._refs[block_id] = 1
        self._num_held += 1
        return block_id

    def share(self, block_id: int) -> bool:
        """One more holder of a held or kept block. Mutates. True if it was only kept before."""
        refs = self._refs[block_id]
        self._refs[block_id] = refs + 1
        if refs == 0:
            self._kept -= 1
            self._num_held += 1
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
            self._num_held -= 1
            return True
        return False

    def give_back(self, block_id: int) -> None:
        """A kept block becomes free: its content is gone. Mutates."""
        if self._refs[block_id] != 0:
            raise InvariantError(f"block {block_id} was given back while it is held")
        self._kept -= 1
        self.pages.put(block_id)

    def statistics(self) -> BlockPoolStatistics:
        """A snapshot; does not mutate."""
        return BlockPoolStatistics(self.num_blocks, self.num_free, self._num_held, self._kept)

    def check(self, holders: Iterable[int] | None = None) -> None:
        """Raise InvariantError where the counts contradict each other.

        `holders`: if given, every block id as often as somebody believes to hold it."""
        self.pages.check()
        num_owned = 0
        for block_id, refs in enumerate(self._refs):
            is_owned = self.pages.owner(block_id) == self._owner
            num_owned += is_owned
            if refs and not is_owned:
                raise InvariantError(f"block {block_id} is not the model's, with {refs} holders")
        num_held = sum(1 for refs in self._refs if refs)
        if num_held != self._num_held or num_held + self._kept != num_owned:
            raise InvariantError(
                f"{num_owned} blocks owned, {num_held} held ({self._num_held} counted) and "
                f"{self._kept} kept"
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
