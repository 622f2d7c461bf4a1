"""Zero eviction on an instance's sequences: who may start so that nobody ever lacks a block."""

from __future__ import annotations

from collections.abc import Iterable

from xllm.master.block_tables import BlockTables
from xllm.master.sequence import Sequence
from xllm.master.strategies.zero_evict import Timetable, blocks_at_end, count_released, will_fit


class Foresight:
    """Asks `zero_evict` about running sequences. Changes nothing."""

    def __init__(self, tables: BlockTables, block_size: int) -> None:
        self._tables = tables
        self._size = block_size

    def may_start(
        self,
        seq: Sequence,
        shared: list[int],
        num_unheld: int,
        decoding: Iterable[Sequence],
        prefilling: Iterable[Sequence],
    ) -> bool:
        """Whether `seq` may run to its end. It shares the blocks `shared` with the cache or its
        leader; `num_unheld` of them nobody holds yet."""
        size = self._size
        cache = self._tables.cache
        held = frozenset(shared)
        prefilling = list(prefilling)
        going = sorted(decoding, key=lambda one: one.end - one.num_planned)
        released = count_released(
            [one.block_ids for one in going],
            lambda block_id: cache.pool.refs(block_id) + (block_id in held),
        )
        timetables = [
            Timetable(one.num_planned + 1, one.end, len(one.block_ids), count)
            for one, count in zip(going, released, strict=True)
            if one.num_planned + 1 < one.end
        ]
        last = max(blocks_at_end(seq.end, size), -(-seq.num_tokens // size))
        lengths = [blocks_at_end(one.end, size) for one in (*going, *prefilling)]
        tables = self._tables
        if not tables.has_slot(seq) or not tables.slots.fit_to_end([*lengths, last]):
            return False
        reserved = last - len(shared)
        for one in prefilling:
            reserved += max(0, blocks_at_end(one.end, size) - len(one.block_ids))
        return will_fit(cache.num_available - num_unheld, reserved, timetables, size)
