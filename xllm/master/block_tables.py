"""Block tables of sequences over the prefix cache: start, grow, seal, fork, release.

Knows nothing of steps or of who goes first. Invariants: a sequence's table covers exactly its
computed tokens and those it was started or grown for; a block is sealed only when all its tokens
are known and a step that succeeded computed them; each table's blocks have one holder for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.blocks import BlockPool
from xllm.kvcache.hashing import next_hash
from xllm.kvcache.owners import OwnedMemory
from xllm.kvcache.prefix import MatchResult, PrefixCache
from xllm.master.limits import InstanceLimits
from xllm.master.sequence import NEVER, Sequence
from xllm.master.slot_maps import SlotMaps, make_table

_NO_MATCH = MatchResult([], 0)


class BlockTables:
    """All block tables of an instance. `owned`: what its model has of a pool that others share;
    without, it has a pool for itself."""

    def __init__(self, limits: InstanceLimits, owned: OwnedMemory | None = None) -> None:
        self._block_size = limits.block_size
        self._is_caching = limits.prefix_cache
        self.num_blocks = limits.num_blocks
        self.cache = PrefixCache(BlockPool(limits.num_blocks)) if owned is None else owned.cache
        table = make_table(limits) if owned is None else owned.slots
        self.slots = SlotMaps(self.cache, table)

    def match(self, seq: Sequence) -> MatchResult:
        """The longest cached prefix of a sequence that has no blocks. At least one position is
        left to compute: of a prompt that is cached whole the last block is given back.
        Sequences that need every row match nothing. A prefix that
        a running sequence is still computing is not matched: its blocks have no hash until their
        step has succeeded (`prefix_sharing` says who waits for that)."""
        if not self._is_caching or seq.needs_all_rows:
            return _NO_MATCH
        num_blocks = (seq.num_tokens - 1) // self._block_size
        if num_blocks == 0:
            return _NO_MATCH
        self._hash_through(seq, num_blocks)
        return self.cache.match(seq.hashes, num_blocks)

    def has_room(self, seq: Sequence, match: MatchResult, spare: int) -> bool:
        """Whether `start` can find its blocks and `spare` others remain after it."""
        return self.has_slot(seq) and self.num_missing(seq, match) + spare <= 0

    def has_slot(self, seq: Sequence, leaving: Iterable[Sequence] = ()) -> bool:
        """Whether `start` can find a slot, where there are slots, once the sequences `leaving`
        are gone."""
        return self.slots.has_room(-(-seq.num_tokens // self._block_size), leaving)

    def num_missing(self, seq: Sequence, match: MatchResult) -> int:
        """How many more blocks must be available for `start`; negative: so many remain."""
        num_new = -(-seq.num_tokens // self._block_size) - len(match.block_ids)
        return num_new + match.num_unheld - self.cache.num_available

    def start(self, seq: Sequence, match: MatchResult) -> None:
        """Give a sequence the blocks of a match (made just now) and new ones for all the tokens
        it has. There must be room."""
        num_matched = len(match.block_ids)
        self.cache.acquire(match.block_ids)
        num_blocks = -(-seq.num_tokens // self._block_size)
        seq.block_ids = self.slots.start(seq, match.block_ids, num_blocks)
        seq.capacity = len(seq.block_ids) * self._block_size
        seq.num_computed = seq.num_planned = num_matched * self._block_size
        seq.num_sealed = num_matched
        seq.seal_at = seq.num_computed + self._block_size if self._is_caching else NEVER

    def grow(self, seq: Sequence) -> bool:
        """One more block for a sequence; False, and nothing changes, where there is none."""
        block_id = self.slots.grow(seq)
        if block_id < 0:
            return False
        seq.block_ids.append(block_id)
        seq.capacity += self._block_size
        return True

    def grow_ahead(self, seq: Sequence) -> None:
        """The block that a sequence will need a step later, if blocks are plentiful: it is mapped
        while this step runs."""
        if self.slots.can_map_ahead:
            self.grow(seq)

    def seal(self, seq: Sequence) -> None:
        """Cache the blocks that `num_computed` has completed. Called once it reached `seal_at`;
        the step that computed them succeeded and their tokens are known."""
        num_full = seq.num_computed // self._block_size
        self._hash_through(seq, num_full)
        hashes = seq.hashes
        for index in range(seq.num_sealed, num_full):
            parent = hashes[index - 1] if index else b""
            if not self.cache.seal(seq.block_ids[index], hashes[index], parent):
                seq.is_private = True
                seq.seal_at = NEVER
                return
            seq.num_sealed = index + 1
        seq.seal_at = (num_full + 1) * self._block_size

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | bool:
        """Give a child without blocks those that `parent` has computed: full ones are shared,
        and a partial one is copied. The copy as (source, destination), or True if none is
        needed; False, and nothing changes, where there is no block or slot for it. The source is
        held once more, until the copy is made: `unpin` it then."""
        num_full, rest = divmod(parent.num_computed, self._block_size)
        copy: tuple[int, int] | bool = True
        shared = parent.block_ids[:num_full]
        if not self.slots.has_room(num_full + 1):
            return False
        if rest:
            fresh = self.cache.allocate(1)
            if fresh is None:
                return False
            copy = (parent.block_ids[num_full], fresh[0])
            self.cache.acquire(copy[:1])
            child.block_ids = shared + fresh
        else:
            child.block_ids = list(shared)
        self.cache.acquire(shared)
        self.slots.place(child, child.block_ids)
        child.capacity = len(child.block_ids) * self._block_size
        child.num_computed = child.num_planned = parent.num_computed
        child.num_sealed = parent.num_sealed
        child.is_private = parent.is_private
        child.seal_at = parent.seal_at
        return copy

    def unpin(self, block_id: int) -> None:
        """The copy from this block is made, or will not be."""
        self.cache.release([block_id])

    def release(self, seq: Sequence) -> None:
        """Take a sequence's blocks away; what was computed stays cached while there is room."""
        self.slots.release(seq)
        if seq.is_private:
            num_full = seq.num_computed // self._block_size
            self._hash_through(seq, num_full)
            self.cache.seal_and_release(seq.block_ids, seq.hashes[:num_full])
        else:
            self.cache.release(seq.block_ids)
        seq.clear_kv()

    def check(self, sequences: Iterable[Sequence], pins: Iterable[int]) -> None:
        """Raise InvariantError unless exactly these sequences and pins hold blocks."""
        holders = list(pins)
        sequences = list(sequences)
        for seq in sequences:
            holders.extend(seq.block_ids)
        self.slots.check(sequences)
        self.cache.check(holders)

    def _hash_through(self, seq: Sequence, num_blocks: int) -> None:
        """Extend the sequence's hashes to its first `num_blocks` blocks."""
        hashes = seq.hashes
        size = self._block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else seq.request.root
            hashes.append(next_hash(parent, seq.tokens(index * size, (index + 1) * size)))
