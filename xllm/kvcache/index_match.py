"""The longest prefix of a chain that each part of the index has. Pure.

Blocks that came together lie together in the table's log, so a chain is a few *runs* there: one
look for the first block of each, and one comparison for all behind it. The first block that is
nowhere ends the chain for everybody. Of what came in many pieces every STRIDE-th block is looked
for, and the others beside these, or else one by one. A running AND over the rows then says who ends
where: its words differ at 64 places for a column at most. What costs is the number of numpy's calls
and of places in memory. No block is taken for another and none is left out: parts may have holes.
"""

from __future__ import annotations

import numpy as np

from xllm.kvcache.block_hash import Slots, Words
from xllm.kvcache.block_table import BlockTable
from xllm.kvcache.index_parts import NUM_PREFIXES, CachedPrefix, PartTable

MAX_RUNS = 4
"""With more than so many pieces the rest is looked for in another way."""
STRIDE_BITS = 4
STRIDE = 1 << STRIDE_BITS


def match_chain(table: BlockTable, parts: PartTable, keys: Words) -> dict[str, CachedPrefix]:
    """Leading blocks by publisher; `keys`: of the chain's blocks, of which there must be one."""
    places = chain_places(table, keys)
    found: dict[str, CachedPrefix] = {}
    if not places:
        return found
    for place in places:
        if table.is_pressed:
            table.touch(place)
    for number, column in enumerate(table.columns):
        rows = [column[place] for place in places]
        row = rows[0] if len(rows) == 1 else np.concatenate(rows)
        _note(parts, number, np.bitwise_and.accumulate(row), found)
    return found


def chain_places(table: BlockTable, keys: Words) -> list[slice | Slots]:
    """Where the chain's leading blocks are, up to the first that is nowhere."""
    places: list[slice | Slots] = []
    start = 0
    while start < len(keys):
        if len(places) == MAX_RUNS:
            rest = _scattered(table, keys[start:])
            absent = np.flatnonzero(rest == table.nowhere)
            places.append(rest[: absent[0]] if len(absent) else rest)
            break
        run = table.run(keys[start:])
        if run.stop == run.start:
            break
        places.append(run)
        start += run.stop - run.start
    return places


def _scattered(table: BlockTable, keys: Words) -> Slots:
    """Where keys are: right behind the probe before them, or right before the one behind them, or
    anywhere. A key that is where it was guessed is nowhere else."""
    probes = np.minimum(np.arange(0, len(keys) + STRIDE, STRIDE), len(keys) - 1)
    probed = table.find(keys[probes])
    places = (probed[:, None] + np.arange(STRIDE)).ravel()[: len(keys)]
    wrong = np.flatnonzero(table.keys[places] != keys)
    if len(wrong):
        behind = (wrong >> STRIDE_BITS) + 1
        guesses = probed[behind] - probes[behind] + wrong
        wanted = keys[wrong]
        places[wrong] = guesses
        still = np.flatnonzero(table.keys[guesses] != wanted)
        if len(still):
            places[wrong[still]] = table.find(wanted[still])
    return places


def _note(parts: PartTable, column: int, row: Words, found: dict[str, CachedPrefix]) -> None:
    """Who ends where, from a running AND along the chain."""
    visible = parts.visible[column]
    first, last = int(row[0]) & visible, int(row[-1]) & visible
    if first != last:
        lost = row[1:] ^ row[:-1]
        lost &= np.uint64(visible)
        borders = np.flatnonzero(lost)
        masks: list[int] = lost[borders].tolist()
        ends: list[int] = (borders + 1).tolist()
        names = parts.alone[column]
        if len(row) < NUM_PREFIXES and all(map(names.__contains__, masks)):
            prefixes = map(parts.prefixes.__getitem__, ends)
            found.update(zip(map(names.__getitem__, masks), prefixes, strict=True))
        else:
            for end, mask in zip(ends, masks, strict=True):
                parts.note(column, mask, end, found)
    if last:
        parts.note(column, last, len(row), found)
