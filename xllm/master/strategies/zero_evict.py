"""Whether one more sequence may start without anybody ever being evicted for it.

The future is walked from end to end: each decoding sequence grows by a token a step until its
longest end and releases its blocks there; what starts or still prefills has no timetable and
counts with all the blocks of its end, for ever. Ending early only releases sooner. Sequences are
allowed DRIFT_STEPS of unevenness each way. Numbers only; the answer errs towards no.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

DRIFT_STEPS = 3
"""A sequence may be so many steps ahead of the timetable, or release its blocks so late."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timetable:
    """A decoding sequence: it has `tokens` and ends with `end` of them, at most; it holds
    `blocks` blocks, of which `released` become free when it ends."""

    tokens: int
    end: int
    blocks: int
    released: int

    @property
    def steps_left(self) -> int:
        """Steps to its end."""
        return self.end - self.tokens


def blocks_at_end(end: int, block_size: int) -> int:
    """Blocks of a sequence that ends with `end` tokens: the last one needs no KV."""
    return -(-(end - 1) // block_size)


def will_fit(
    num_free: int, reserved: int, timetables: Iterable[Timetable], block_size: int
) -> bool:
    """Whether nobody will ever lack a block. `num_free`: blocks to be had now; `reserved`: those
    that sequences without a timetable may still come to need."""
    left = num_free - reserved
    if left < 0:
        return False
    ahead = sorted(timetables, key=lambda one: one.steps_left)
    growth = _Growth(ahead, block_size)
    num_released = 0
    for index, one in enumerate(ahead):
        step = one.steps_left
        while ahead[num_released].steps_left + DRIFT_STEPS < step:
            gone = ahead[num_released]
            left += gone.released
            growth.release(gone)
            num_released += 1
        if growth.blocks(step) > left:
            return False
        growth.end(ahead[index])
    return True


class _Growth:
    """New blocks that a set of sequences needs by a step: one histogram of where in its block
    each stands, so that asking costs no walk over the sequences."""

    def __init__(self, sequences: Sequence[Timetable], block_size: int) -> None:
        self._size = block_size
        self._phases = [0] * block_size
        self._base = 0
        self._count = 0
        self._ended = 0
        for one in sequences:
            full, phase = self._place(one)
            self._phases[phase] += 1
            self._base += full - self._held(one)
            self._count += 1

    def blocks(self, step: int) -> int:
        """Blocks taken by then, over those held now."""
        full, phase = divmod(step, self._size)
        crossed = sum(self._phases[self._size - phase :]) if phase else 0
        return self._base + self._count * full + crossed + self._ended

    def end(self, one: Timetable) -> None:
        """A sequence grows no more; its blocks are still held."""
        full, phase = self._place(one)
        self._phases[phase] -= 1
        self._base -= full - self._held(one)
        self._count -= 1
        self._ended += self._grown(one)

    def release(self, one: Timetable) -> None:
        """The blocks that it grew by are free again."""
        self._ended -= self._grown(one)

    def _place(self, one: Timetable) -> tuple[int, int]:
        return divmod(one.tokens - 1 + DRIFT_STEPS + self._size - 1, self._size)

    def _held(self, one: Timetable) -> int:
        return min(one.blocks, -(-one.tokens // self._size))

    def _grown(self, one: Timetable) -> int:
        return max(0, blocks_at_end(one.end, self._size) - one.blocks)


def count_released(tables: Iterable[Sequence[int]], refs: Callable[[int], int]) -> list[int]:
    """For each of these block tables, in the order in which their sequences end: how many blocks
    become free with it. A block goes with its last holder, and never if somebody else holds it.
    Blocks with several holders lie at the front of a table."""
    seen: dict[int, int] = {}
    counts = []
    for table in tables:
        num_shared = num_last = 0
        for block_id in table:
            holders = refs(block_id)
            if holders <= 1:
                break
            num_shared += 1
            seen[block_id] = seen.get(block_id, 0) + 1
            num_last += seen[block_id] == holders
        counts.append(num_last + len(table) - num_shared)
    return counts
