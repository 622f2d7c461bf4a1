"""The prefix cache: which blocks hold which content, and which of them goes when room is needed.

Cached blocks form trees by content hash: a block's parent holds the tokens before it. Blocks
without holder stay cached and are evicted leaf first, the least recently used leaf before the
others, so that a cached block's parents are always there and the longest prefix is found by
walking down from the first hash. Knows no tokens, sequences or time; keys are whole hashes.

Invariants: the parent of a cached block is cached; the parent of a held cached block is held
(hence every unheld cached block can be evicted); a content is cached in at most one block.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import Protocol

from xllm.errors import InvariantError
from xllm.kvcache.blocks import BlockPool
from xllm.kvcache.digest import digest_of, hash_key
from xllm.protocol.bus import BlockEvents


@dataclasses.dataclass(frozen=True, slots=True)
class MatchResult:
    """The blocks of the longest cached prefix, first to last. Valid until the cache is next
    asked to allocate: `acquire` them before."""

    block_ids: list[int]
    num_unheld: int
    """How many of them nobody holds: acquiring takes these from what can be allocated."""


class Neighbours(Protocol):
    """Other models over the same pages, as a cache sees them; see `owners`."""

    @property
    def num_kept(self) -> int:
        """Blocks that they have cached and nobody holds."""

    def evict(self, count: int) -> None:
        """Have them forget so many of these. There must be as many."""

    def note_use(self) -> None:
        """This cache takes pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixCacheStatistics:
    """`num_available`: blocks that `allocate` can give, evictions included."""

    num_cached: int
    num_available: int
    num_evicted: int


class PrefixCache:
    """Content hashes over a block pool; the only user of that pool."""

    __slots__ = (
        "_by_hash", "_changes", "_children", "_clock", "_hash", "_leaves", "_neighbours",
        "_num_evicted", "_parent", "_used", "digest", "pool",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, neighbours: Neighbours | None = None) -> None:
        """`neighbours`: who shares the pool's pages; their cached blocks give way to ours where we
        have none left to evict."""
        self.pool = pool
        self._neighbours = neighbours
        self._by_hash: dict[bytes, int] = {}
        # By block id. The parent is kept as a hash: the block behind a hash may change.
        self._hash: list[bytes] = [b""] * pool.num_blocks
        self._parent: list[bytes] = [b""] * pool.num_blocks
        self._children = [0] * pool.num_blocks
        self._used = [0] * pool.num_blocks
        self._clock = 0
        # Candidates for eviction as (last use, block id). Entries are not removed when a block
        # is used again: what no longer agrees with `_used` is skipped.
        self._leaves: list[tuple[int, int]] = []
        # Net changes since the last drain: True stored, False removed.
        self._changes: dict[bytes, bool] = {}
        self._num_evicted = 0
        self.digest = 0
        """Of the cached blocks, see `digest`."""

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones that nobody holds."""
        num_own = self.pool.num_free + self.pool.num_kept
        return num_own if self._neighbours is None else num_own + self._neighbours.num_kept

    @property
    def num_cached(self) -> int:
        """Contents that are cached."""
        return len(self._by_hash)

    def hash_of(self, block_id: int) -> bytes:
        """The content hash that a block is cached under, or b""."""
        return self._hash[block_id]

    def match(self, hashes: Sequence[bytes], limit: int | None = None) -> MatchResult:
        """The longest cached prefix of a chain of hashes, at most `limit` blocks. Does not
        mutate."""
        found: list[int] = []
        by_hash = self._by_hash
        refs = self.pool.refs
        num_unheld = 0
        for value in hashes if limit is None else hashes[:limit]:
            block_id = by_hash.get(value)
            if block_id is None:
                break
            found.append(block_id)
            if refs(block_id) == 0:
                num_unheld += 1
        return MatchResult(found, num_unheld)

    def acquire(self, block_ids: Sequence[int]) -> None:
        """One more holder for each block of a match or of another holder's table, parents
        first. Mutates; undone by `release`."""
        share = self.pool.share
        for block_id in block_ids:
            share(block_id)

    def make_room(self, count: int) -> bool:
        """Evict, what is ours first, until `count` blocks are free; False, and nothing evicted,
        where there are not as many."""
        pool = self.pool
        if self._neighbours is not None:
            self._neighbours.note_use()
        if count > pool.num_free:
            if count > self.num_available:
                return False
            self.evict(min(count - pool.num_free, pool.num_kept))
            if self._neighbours is not None and count > pool.num_free:
                self._neighbours.evict(count - pool.num_free)
        return True

    def allocate(self, count: int, wanted: Sequence[int] = (), after: int = -1) -> list[int] | None:
        """`count` blocks with one holder each, evicting as needed; None (and nothing mutated)
        where there are not as many. The content of the blocks is undefined. `wanted`: for the
        first of them, blocks that are taken where they are free; the others follow each other,
        the first of all the block `after`, as far as that is possible."""
        if not self.make_room(count):
            return None
        take = self.pool.take
        if wanted:
            return self._take_wanted(count, wanted, after)
        blocks = []
        for _ in range(count):
            after = take(-1, after)
            blocks.append(after)
        return blocks

    def evict(self, count: int) -> None:
        """Forget `count` contents that nobody holds, the least recently used leaves first.
        Mutates. There must be as many."""
        for _ in range(count):
            self._evict()

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each block of a table (first to last). Mutates. Blocks that
        nobody holds any more stay cached where they have a hash and become free otherwise."""
        pool = self.pool
        clock = self._clock
        for block_id in reversed(block_ids):
            if not pool.drop(block_id):
                continue
            if self._hash[block_id]:
                clock += 1
                self._used[block_id] = clock
                if self._children[block_id] == 0:
                    heapq.heappush(self._leaves, (clock, block_id))
            else:
                pool.give_back(block_id)
        self._clock = clock
        if len(self._leaves) > 2 * pool.num_blocks + 64:
            self._compact()

    def seal(self, block_id: int, content: bytes, parent: bytes) -> bool:
        """Cache a held block, complete and computed, under its content hash. Mutates.

        `parent`: the hash of the block before it, which the same holder holds as cached, or
        b"" for a first block. False, and nothing is mutated, if another held block has the
        content: this one then stays its holder's own, and so must the blocks after it until
        they are released (`seal_and_release`). An unheld block of that content gives way."""
        other = self._by_hash.get(content)
        if other is None:
            self._store(block_id, content, parent)
            return True
        if other == block_id:
            return True
        if self.pool.refs(other) > 0:
            return False
        self._by_hash[content] = block_id
        self._hash[block_id] = content
        self._parent[block_id] = self._parent[other]
        self._children[block_id] = self._children[other]
        self._forget(other)
        self.pool.give_back(other)
        return True

    def seal_and_release(self, block_ids: Sequence[int], contents: Sequence[bytes]) -> None:
        """`release` a table whose first blocks have these contents, caching before what could
        not be sealed while it was held. Mutates."""
        parent = b""
        for block_id, content in zip(block_ids, contents, strict=False):
            if content not in self._by_hash:
                if self.pool.refs(block_id) > 1:
                    # Its other holder does not hold the parent: it would be stranded.
                    break
                self._store(block_id, content, parent)
            parent = content
        self.release(block_ids)

    def drain_events(self) -> BlockEvents | None:
        """What was stored and removed since the last call, for the bus; None if nothing."""
        if not self._changes:
            return None
        stored = b"".join(value for value, is_stored in self._changes.items() if is_stored)
        removed = b"".join(value for value, is_stored in self._changes.items() if not is_stored)
        self._changes = {}
        return BlockEvents(stored, removed)

    def snapshot(self) -> bytes:
        """The hashes of all cached blocks, concatenated. Does not mutate."""
        return b"".join(self._by_hash)

    def statistics(self) -> PrefixCacheStatistics:
        """A snapshot; does not mutate."""
        return PrefixCacheStatistics(
            len(self._by_hash),
            self.num_available,
            self._num_evicted,
        )

    def check(self, holders: Iterable[int] | None = None) -> None:
        """Raise InvariantError where the module's invariants do not hold; `holders` as for
        BlockPool.check."""
        self.pool.check(holders)
        children = [0] * self.pool.num_blocks
        num_unheld = 0
        for content, block_id in self._by_hash.items():
            if self._hash[block_id] != content:
                raise InvariantError(f"block {block_id} is found under a hash it does not have")
            num_unheld += self.pool.refs(block_id) == 0
            parent = self._parent[block_id]
            if not parent:
                continue
            if parent not in self._by_hash:
                raise InvariantError(f"block {block_id} is cached without its parent")
            children[self._by_hash[parent]] += 1
            if self.pool.refs(block_id) > 0 and self.pool.refs(self._by_hash[parent]) == 0:
                raise InvariantError(f"block {block_id} is held and its parent is not")
        if children != self._children:
            raise InvariantError("the counts of children are wrong")
        if digest_of(self.snapshot()) != self.digest:
            raise InvariantError("the digest is not that of what is cached")
        if num_unheld != self.pool.num_kept:
            raise InvariantError(f"{self.pool.num_kept} blocks kept, {num_unheld} of them cached")
        if sum(1 for value in self._hash if value) != len(self._by_hash):
            raise InvariantError("a block has a hash that nobody finds it under")
        self._check_leaves()

    def _check_leaves(self) -> None:
        candidates = set(self._leaves)
        for block_id in self._by_hash.values():
            is_leaf = self.pool.refs(block_id) == 0 and self._children[block_id] == 0
            if is_leaf and (self._used[block_id], block_id) not in candidates:
                raise InvariantError(f"unheld leaf {block_id} can never be evicted")

    def _take_wanted(self, count: int, wanted: Sequence[int], after: int) -> list[int]:
        pool, owner = self.pool, self.pool.pages.owner
        blocks = [-1] * count
        # First those that are wanted: no other may get them by the way.
        for index, block_id in enumerate(wanted[:count]):
            if block_id >= 0 and owner(block_id) < 0:
                blocks[index] = pool.take(block_id)
        for index, block_id in enumerate(blocks):
            if block_id < 0:
                blocks[index] = pool.take(-1, after)
            after = blocks[index]
        return blocks

    def _store(self, block_id: int, content: bytes, parent: bytes) -> None:
        if parent:
            self._children[self._by_hash[parent]] += 1
        self._by_hash[content] = block_id
        self._hash[block_id] = content
        self._parent[block_id] = parent
        self.digest ^= hash_key(content)
        self._note(content, True)

    def _forget(self, block_id: int) -> None:
        self._hash[block_id] = b""
        self._parent[block_id] = b""
        self._children[block_id] = 0
        self._used[block_id] = 0

    def _is_evictable(self, used: int, block_id: int) -> bool:
        return (
            self._used[block_id] == used
            and bool(self._hash[block_id])
            and self._children[block_id] == 0
            and self.pool.refs(block_id) == 0
        )

    def _evict(self) -> None:
        """Forget the least recently used leaf; its parent may be a leaf from now on."""
        while True:
            used, block_id = heapq.heappop(self._leaves)
            if self._is_evictable(used, block_id):
                break
        content, parent = self._hash[block_id], self._parent[block_id]
        del self._by_hash[content]
        self._forget(block_id)
        self.pool.give_back(block_id)
        self.digest ^= hash_key(content)
        self._note(content, False)
        self._num_evicted += 1
        if parent:
            parent_id = self._by_hash[parent]
            self._children[parent_id] -= 1
            if self._children[parent_id] == 0 and self.pool.refs(parent_id) == 0:
                heapq.heappush(self._leaves, (self._used[parent_id], parent_id))

    def _note(self, content: bytes, is_stored: bool) -> None:
        # A hash is stored and removed in turn: two changes since the last drain cancel out.
        if content in self._changes:
            del self._changes[content]
        else:
            self._changes[content] = is_stored

    def _compact(self) -> None:
        self._leaves = sorted(entry for entry in set(self._leaves) if self._is_evictable(*entry))
