"""Who gives up its blocks when there are not enough: decided from sort keys alone.

The victim is recomputed later from its tokens: offline before online, the lowest priority, the
latest arrival. One with a step in flight cannot give way at once; that is the caller's concern.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.kvcache.blocks import BlockPool
from xllm.master.sequence import Sequence, SequencePhase

_HOLDING = (SequencePhase.RUNNING, SequencePhase.PAUSED)


def choose_victim(running: Iterable[Sequence]) -> Sequence:
    """The sequence, running or paused, that can best wait; there must be one."""
    able = (seq for seq in running if seq.state in _HOLDING)
    return max(able, key=lambda seq: seq.key)


def order_victims(running: Iterable[Sequence]) -> list[Sequence]:
    """All that can wait, who best can first."""
    able = [seq for seq in running if seq.state is SequencePhase.RUNNING]
    return sorted(able, key=lambda seq: seq.key, reverse=True)


def order_paused(paused: Iterable[Sequence]) -> list[Sequence]:
    """Paused ones, who best can lose their blocks first."""
    return sorted(paused, key=lambda seq: seq.key, reverse=True)


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
