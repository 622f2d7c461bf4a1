"""Who gives up its blocks when there are not enough: decided from sort keys alone.

The victim is recomputed later from its tokens: offline before online, the lowest priority, the
latest arrival. A sequence with a step in flight is never chosen: its blocks are being written.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.blocks import BlockPool
from xllm.master.sequence import Sequence, SequencePhase


def choose_victim(running: Iterable[Sequence]) -> Sequence | None:
    """The running sequence that can best wait; None if all have a step in flight."""
    victim: Sequence | None = None
    for seq in running:
        can_wait = seq.state is SequencePhase.RUNNING and not seq.num_in_flight
        if can_wait and (victim is None or seq.key > victim.key):
            victim = seq
    return victim


def order_victims(running: Iterable[Sequence]) -> list[Sequence]:
    """All that can wait, who best can first."""
    able = [s for s in running if s.state is SequencePhase.RUNNING and not s.num_in_flight]
    return sorted(able, key=lambda seq: seq.key, reverse=True)


class FreedBlocks:
    """Counts the blocks that victims would free: those that nobody else holds. `kept`: blocks
    that are wanted as they are, so that freeing them gains nothing. Changes no pool."""

    __slots__ = ("_kept", "_pool", "_taken", "num_blocks")

    def __init__(self, pool: BlockPool, kept: Iterable[int]) -> None:
        self._pool = pool
        self._kept = frozenset(kept)
        self._taken: dict[int, int] = {}
        self.num_blocks = 0

    def add(self, block_ids: Iterable[int]) -> None:
        """One more victim has this block table."""
        for block_id in block_ids:
            taken = self._taken.get(block_id, 0) + 1
            self._taken[block_id] = taken
            if taken == self._pool.refs(block_id) and block_id not in self._kept:
                self.num_blocks += 1
