"""The longest prefix of a chain that each part of the index has. Pure.

Looked at is every STRIDE-th block first. A device tier keeps the parents of its blocks, so what it
has of a chain is a prefix: where two blocks are held by the same such parts, so are all between
them, and only the stretches where somebody ends are looked at in full. Where any other part (DRAM,
SSD, one that lost blocks to the limit of bytes) has the first block, or many end at
different places, every block is looked at. A running AND along the chain then says who ends where.
"""

from __future__ import annotations

import numpy as np

from xllm.kvcache.block_table import BlockTable, Slots, Words
from xllm.kvcache.index_parts import NUM_PREFIXES, CachedPrefix, PartTable

STRIDE = 32
MAX_STRETCHES = 8
"""With more than so many of them, every block is looked at."""


def match_chain(table: BlockTable, parts: PartTable, keys: Words) -> dict[str, CachedPrefix]:
    """Leading blocks by publisher; `keys`: of the chain's blocks."""
    found: dict[str, CachedPrefix] = {}
    num_blocks = len(keys)
    if not num_blocks or not any(parts.visible):
        return found
    at: Slots = np.arange(0, num_blocks + STRIDE - 1, STRIDE)
    at[-1] = num_blocks - 1
    slots = table.find(keys[at])
    if slots[0] == table.nowhere:
        return found
    rows = [np.bitwise_and.accumulate(column[slots]) for column in table.columns]
    more = _to_look_at(parts, at, rows)
    if more is not None:
        at = more
        slots = table.find(keys[at])
        rows = [np.bitwise_and.accumulate(column[slots]) for column in table.columns]
    if table.is_pressed:
        table.touch(slots)
    for number, row in enumerate(rows):
        _note(parts, number, at, row, found)
    return found


def _to_look_at(parts: PartTable, at: Slots, rows: list[Words]) -> Slots | None:
    """The blocks to look at after those of `at`, which are among them; None if these say all."""
    num_blocks = int(at[-1]) + 1
    if any(int(row[0]) & mask for row, mask in zip(rows, parts.unchained, strict=True)):
        return np.arange(num_blocks)
    ends = np.zeros(len(at) - 1, np.bool_)
    for row in rows:
        ends |= row[1:] != row[:-1]
    stretches = np.flatnonzero(ends)
    if not len(stretches):
        return None
    if len(stretches) > MAX_STRETCHES:
        return np.arange(num_blocks)
    inside = at[stretches][:, None] + np.arange(STRIDE)
    inside = np.append(inside[inside < num_blocks], at)
    inside.sort()
    chosen: Slots = inside[np.append(True, inside[1:] != inside[:-1])]
    return chosen


def _note(
    parts: PartTable, column: int, at: Slots, row: Words, found: dict[str, CachedPrefix]
) -> None:
    """Who ends before the block with the number `at` of each change in a running AND. Between a
    change and the entry before it there is no other block of the chain."""
    borders = np.flatnonzero(row[1:] != row[:-1]) + 1
    visible = parts.visible[column]
    before = int(row[0]) & visible
    alone, prefixes = parts.alone[column], parts.prefixes
    for end, word in zip(at[borders].tolist(), row[borders].tolist(), strict=True):
        after = word & visible
        if after != before:
            publisher = alone.get(before ^ after)
            if publisher is not None and end < NUM_PREFIXES:
                found[publisher] = prefixes[end]
            else:
                parts.note(column, before ^ after, end, found)
            before = after
    if before:
        parts.note(column, before, int(at[-1]) + 1, found)
