"""Slots of sequences beside their block tables: which one, and what is mapped under it when.

A worker that has slots reads a sequence's KV in one range of addresses. Here a sequence gets its
slot together with its blocks, so that the blocks can be those that are mapped there already.
Without slots blocks are found all the same. Invariant: a sequence that runs at a worker with slots
has one, and exactly its block table is mapped there once the plans made so far are carried out.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.prefix import PrefixCache
from xllm.kvcache.slots import SlotTable
from xllm.master.limits import InstanceLimits
from xllm.master.sequence import NO_SLOT, Sequence
from xllm.protocol.step import MapPages

_PLENTY = 8
"""Pages are mapped ahead while one in so many can still be had."""


def make_table(limits: InstanceLimits) -> SlotTable | None:
    """The slots of an instance that shares its memory with none; None where there are none."""
    if not limits.num_slots:
        return None
    return SlotTable(limits.num_slots, limits.pages_per_slot, limits.max_mappings)


class SlotMaps:
    """Finds blocks in `cache`, and slots for them in `table`, where the worker has slots."""

    def __init__(self, cache: PrefixCache, table: SlotTable | None) -> None:
        self._cache = cache
        self._is_free = cache.pool.is_free
        self.table = table

    @property
    def can_map_ahead(self) -> bool:
        """Whether a page should be found before the token that needs it."""
        cache = self._cache
        return self.table is not None and cache.num_available * _PLENTY >= cache.pool.num_blocks

    def has_room(self, num_blocks: int, leaving: Iterable[Sequence] = ()) -> bool:
        """Whether there is a slot for so many blocks, once the sequences `leaving` are gone."""
        if self.table is None:
            return True
        return self.table.has_room(num_blocks, [seq.slot for seq in leaving if seq.slot >= 0])

    def fit_to_end(self, num_blocks: Iterable[int]) -> bool:
        """Whether sequences that grow to so many blocks each never lack mappings, however their
        blocks lie."""
        table = self.table
        return table is None or sum([n + 2 for n in num_blocks]) <= table.max_mappings

    def start(self, seq: Sequence, matched: list[int], num_blocks: int) -> list[int]:
        """The blocks of a sequence that begins with those `matched` (which it holds), mapped
        under a slot of its own. There must be room."""
        table, num_new = self.table, num_blocks - len(matched)
        last = matched[-1] if matched else -1
        if table is None:
            fresh = self._cache.allocate(num_new, (), last)
            assert fresh is not None
            return matched + fresh
        # What must go goes first: it may lie where it is wanted.
        has_room = self._cache.make_room(num_new)
        assert has_room
        choice = table.choose(matched, num_blocks, self._is_free)
        fresh = self._cache.allocate(num_new, choice.wanted, last)
        assert fresh is not None
        self._assign(seq, choice.slot, matched + fresh)
        return matched + fresh

    def place(self, seq: Sequence, block_ids: list[int]) -> None:
        """A slot for a fork with these blocks, which it holds. There must be room."""
        if self.table is not None:
            choice = self.table.choose(block_ids, len(block_ids), self._is_free)
            self._assign(seq, choice.slot, block_ids)

    def grow(self, seq: Sequence) -> int:
        """One more block for a sequence; -1, and nothing changes for it, where there is none or
        it cannot be mapped."""
        table = self.table
        last = seq.block_ids[-1]
        if table is None:
            fresh = self._cache.allocate(1, (), last)
            return -1 if fresh is None else fresh[0]
        fresh = self._cache.allocate(1, (table.wanted_next(seq.slot),), last)
        if fresh is None:
            return -1
        if not table.extend(seq.slot, fresh):
            self._cache.release(fresh)
            return -1
        return fresh[0]

    def release(self, seq: Sequence) -> None:
        """A sequence needs its slot no more, if it has one. What is mapped there stays."""
        if self.table is not None and seq.slot >= 0:
            self.table.release(seq.slot)
            seq.slot = NO_SLOT

    def distrust(self, seq: Sequence) -> None:
        """A step of the sequence failed: its maps may not have been made."""
        if self.table is not None and seq.slot >= 0:
            self.table.distrust(seq.slot)

    def drain(self) -> tuple[MapPages, ...]:
        """What the worker must map before the next step, or while it runs."""
        return () if self.table is None else self.table.drain()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise InvariantError unless exactly these sequences' blocks are mapped."""
        if self.table is not None:
            self.table.check([(seq.slot, seq.block_ids) for seq in sequences if seq.slot >= 0])

    def _assign(self, seq: Sequence, slot: int, block_ids: list[int]) -> None:
        assert self.table is not None
        is_mapped = self.table.assign(slot, block_ids)
        assert is_mapped
        seq.slot = slot
