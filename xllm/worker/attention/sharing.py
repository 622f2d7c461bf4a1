"""Which sequences of a step begin with the same blocks, so that attention may read them once.

Attention cuts a context into partitions of PARTITION tokens, and whole ones are shared: what they
hold must stand in the same blocks and before the rows of both sequences.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

from xllm.worker.attention.plan import Span

PARTITION = 256
"""As kPartition of kernels/cpu/attention.h."""

_MAX_ROWS = 8
"""Spans of more rows are left out: theirs fill a work item of the kernels without others'."""


def find_sharing(spans: Sequence[Span], block_size: int) -> tuple[list[int], list[int]]:
    """(order, common), both empty where nothing is shared: the spans that share with others, by
    their numbers, such that those with most in common are neighbours, and how many leading
    partitions each has in common with the one before it. 0 begins other company."""
    company: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        if span.start >= PARTITION and span.num_rows <= _MAX_ROWS:
            company.setdefault(span.block_ids[0], []).append(index)
    order: list[int] = []
    common: list[int] = []
    for members in company.values():
        if len(members) > 1:
            _join(spans, members, block_size, order, common)
    return order, common


def _join(
    spans: Sequence[Span],
    members: Sequence[int],
    block_size: int,
    order: list[int],
    common: list[int],
) -> None:
    """Add spans with the same first block, without those that have no whole partition in common
    with a neighbour."""
    tables = {
        index: spans[index].block_ids[: spans[index].start // PARTITION * PARTITION // block_size]
        for index in members
    }
    ordered = sorted(members, key=tables.__getitem__)
    shared = [
        _num_equal(tables[one], tables[other]) * block_size // PARTITION
        for one, other in itertools.pairwise(ordered)
    ]
    for index, before, after in zip(ordered, [0, *shared], [*shared, 0], strict=True):
        if before or after:
            order.append(index)
            common.append(before)


def _num_equal(one: array[int], other: array[int]) -> int:
    """How many numbers two arrays begin with in common."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
