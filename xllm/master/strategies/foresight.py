"""Zero eviction on an instance's sequences: who may start so that nobody ever lacks a block."""

from __future__ import annotations

from collections.abc import Collection, Iterable

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
        prefilling: Collection[Sequence],
    ) -> bool:
        """Whether `seq` may run to its end. It shares the blocks `shared` with the cache or its
        leader; `num_unheld` of them nobody holds yet."""
        size = self._size
        cache, tables = self._tables.cache, self._tables
        running = [*decoding, *prefilling]
        last = max(blocks_at_end(seq.end, size), -(-seq.num_tokens // size))
        lengths = [-(-(one.end - 1) // size) for one in running]  # as blocks_at_end has it
        if not tables.has_slot(seq) or not tables.slots.fit_to_end([*lengths, last]):
            return False
        num_free, reserved = cache.num_available - num_unheld, last - len(shared)
        pairs = zip(lengths, [len(one.block_ids) for one in running], strict=True)
        growths = [length - held if length > held else 0 for length, held in pairs]
        if sum(growths) + reserved <= num_free:
            return True  # whoever ends when: nearly always, and much cheaper to know
        num_decoding = len(running) - len(prefilling)
        reserved += sum(growths[num_decoding:])
        held = frozenset(shared)
        going = sorted(running[:num_decoding], key=lambda one: one.end - one.num_planned)
        released = count_released(
            [one.block_ids for one in going],
            lambda block_id: cache.pool.refs(block_id) + (block_id in held),
        )
        timetables = [
            Timetable(one.num_planned + 1, one.end, len(one.block_ids), count)
            for one, count in zip(going, released, strict=True)
            if one.num_planned + 1 < one.end
        ]
        return will_fit(num_free, reserved, timetables, size)
