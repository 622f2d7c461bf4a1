"""What is mapped under each slot, and how many mappings that takes.

The kernel keeps one mapping for each run of pages that follow each other in the pool, and one for
the rest of the slot's range. Pure: the changes are collected as operations for the worker
(`drain`), which carries them out in order. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.errors import InvariantError
from xllm.protocol.step import MapPages


class MappedPages:
    """The pages under `num_slots` slots, from the first on, without gaps."""

    __slots__ = ("_counts", "_operations", "_pages", "num_mappings")

    def __init__(self, num_slots: int) -> None:
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]
        self._counts = [0] * num_slots
        self._operations: list[MapPages] = []
        self.num_mappings = 0
        """Of all slots together."""

    def under(self, slot: int) -> list[int]:
        """The pages of a slot, for reading."""
        return self._pages[slot]

    def count(self, slot: int) -> int:
        """The mappings of a slot."""
        return self._counts[slot]

    def growth(self, slot: int, first: int, page_ids: Sequence[int], is_cut: bool) -> int:
        """How many mappings more there will be with `page_ids` at `first`, and nothing behind
        them if `is_cut`. Mutates nothing."""
        pages = self._pages[slot]
        behind = [] if is_cut else pages[first + len(page_ids) :]
        before = pages[max(first - 1, 0) : first]
        return _count([*before, *page_ids, *behind]) - _count(pages[max(first - 1, 0) :])

    def map(self, slot: int, first: int, page_ids: Sequence[int]) -> None:
        """Map pages from an index on that is not behind the last. Mutates."""
        pages = self._pages[slot]
        assert first <= len(pages)
        end = first + len(page_ids)
        old = 2 + _breaks(pages, first, end + 1) if pages else 0
        pages[first:end] = page_ids
        self._change(slot, 2 + _breaks(pages, first, end + 1) - old)
        self._operations.append(MapPages(slot, first, tuple(page_ids)))

    def cut(self, slot: int, first: int) -> None:
        """Unmap everything from an index on. Mutates."""
        pages = self._pages[slot]
        if first >= len(pages):
            return
        gone = _breaks(pages, first, len(pages)) + (0 if first else 2)
        del pages[first:]
        self._change(slot, -gone)
        self._operations.append(MapPages(slot, first))

    def shortened(self, slot: int, num_mappings: int) -> int:
        """How many of a slot's pages can stay if it gives up so many mappings, or all it has."""
        pages = self._pages[slot]
        if num_mappings >= self._counts[slot] - 1:
            return 0
        keep = len(pages)
        while num_mappings and keep > 1:
            keep -= 1
            num_mappings -= pages[keep] != pages[keep - 1] + 1
        return keep

    def drain(self) -> tuple[MapPages, ...]:
        """The operations since the last call, in order."""
        if not self._operations:
            return ()
        operations = tuple(self._operations)
        self._operations = []
        return operations

    def check(self) -> None:
        """Raise InvariantError where a count is not that of the pages."""
        for slot, pages in enumerate(self._pages):
            if self._counts[slot] != _count(pages):
                raise InvariantError(f"slot {slot}: {self._counts[slot]} mappings of {pages}")
        if sum(self._counts) != self.num_mappings:
            raise InvariantError(f"{self.num_mappings} mappings, {sum(self._counts)} are there")

    def _change(self, slot: int, change: int) -> None:
        self._counts[slot] += change
        self.num_mappings += change


def _breaks(pages: Sequence[int], start: int, stop: int) -> int:
    """Places in [start, stop) where a page does not follow the one before it."""
    return sum([pages[i] != pages[i - 1] + 1 for i in range(max(start, 1), min(stop, len(pages)))])


def _count(pages: Sequence[int]) -> int:
    """Mappings of a slot with these pages."""
    return _breaks(pages, 1, len(pages)) + 2 if pages else 0


def differing(mapped: Sequence[int], page_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [begin, stop) of `page_ids` that are not in their place in `mapped`, which may be
    shorter."""
    if not mapped:
        return [(0, len(page_ids))] if page_ids else []
    runs: list[tuple[int, int]] = []
    begin = -1
    for index, (have, page) in enumerate(zip(mapped, page_ids, strict=False)):
        if have == page:
            if begin >= 0:
                runs.append((begin, index))
                begin = -1
        elif begin < 0:
            begin = index
    if begin < 0 and len(mapped) < len(page_ids):
        begin = len(mapped)
    if begin >= 0:
        runs.append((begin, len(page_ids)))
    return runs
