"""Slots: virtual ranges of the longest sequence, with pages of the pool mapped under them.

A page is one block of all layers. Which slot belongs to whom and what is mapped under it is the
master's to decide (`kvcache.slots`); here it is carried out and remembered. Invariant: `pages`
says what is mapped, also after a mapping failed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

from xllm.errors import EngineError, InvariantError
from xllm.worker.memory.virtual import VirtualMemory

NO_PAGE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class SlotStatistics:
    """Calls to map (runs of pages that lie together are one), pages that they mapped, calls to
    unmap, and the time of all of them."""

    num_slots: int
    num_mapped_pages: int
    num_map_calls: int
    num_pages_mapped: int
    num_unmap_calls: int
    map_ns: int


class SlotSpace:
    """`num_slots` slots of `pages_per_slot` pages of `page_bytes` each. One thread at a time works
    on a slot; different slots may be worked on at once."""

    def __init__(
        self,
        memory: VirtualMemory,
        *,
        num_slots: int,
        pages_per_slot: int,
        page_bytes: int,
        num_pages: int,
    ) -> None:
        """Reserves the addresses; `num_pages` is the size of the pool. EngineError where there
        are not enough."""
        assert num_slots > 0
        assert pages_per_slot > 0
        assert page_bytes % memory.granularity == 0
        self.num_slots = num_slots
        self.pages_per_slot = pages_per_slot
        self.page_bytes = page_bytes
        self._num_pages = num_pages
        self._memory = memory
        self._base = memory.reserve(num_slots * pages_per_slot * page_bytes)
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]
        self._num_map_calls = 0
        self._num_pages_mapped = 0
        self._num_unmap_calls = 0
        self._map_ns = 0

    def address(self, slot: int) -> int:
        """Where a slot begins: block b of its sequence is b * page_bytes behind."""
        return self._base + slot * self.pages_per_slot * self.page_bytes

    def pages(self, slot: int) -> Sequence[int]:
        """The page ids mapped under a slot, first to last; NO_PAGE where there is none."""
        return self._pages[slot]

    def map(self, slot: int, first_page: int, page_ids: Sequence[int]) -> None:
        """Map pages under a slot from a page index on, in place of what is there. Pages that are
        there already are left alone. EngineError for what cannot be."""
        self._check_range(slot, first_page, len(page_ids))
        if page_ids and not 0 <= min(page_ids) <= max(page_ids) < self._num_pages:
            raise EngineError(f"slot {slot}: pages {page_ids} of {self._num_pages}")
        mapped = self._pages[slot]
        end = first_page + len(page_ids)
        mapped.extend([NO_PAGE] * (end - len(mapped)))
        began = time.perf_counter_ns()
        for index, count in _runs(mapped, first_page, page_ids):
            self._map_run(slot, index, page_ids[index - first_page], count)
        self._map_ns += time.perf_counter_ns() - began

    def unmap(self, slot: int, first_page: int = 0) -> None:
        """Take away all pages of a slot from an index on. EngineError where the device refuses;
        then none of them counts as mapped, and some may be."""
        self._check_range(slot, first_page, 0)
        mapped = self._pages[slot]
        if first_page >= len(mapped):
            return
        began = time.perf_counter_ns()
        address = self.address(slot) + first_page * self.page_bytes
        count = len(mapped) - first_page
        # Nothing is known to be there until the call is back.
        mapped[first_page:] = [NO_PAGE] * count
        self._memory.unmap(address, count * self.page_bytes)
        del mapped[first_page:]
        self._num_unmap_calls += 1
        self._map_ns += time.perf_counter_ns() - began

    def forget(self) -> None:
        """Unmap everything."""
        for slot in range(self.num_slots):
            self.unmap(slot)

    def close(self) -> None:
        """Give the addresses back. Nothing may use them any more."""
        self._memory.close()

    def statistics(self) -> SlotStatistics:
        """A snapshot."""
        mapped = sum(len(pages) - pages.count(NO_PAGE) for pages in self._pages)
        return SlotStatistics(
            self.num_slots,
            mapped,
            self._num_map_calls,
            self._num_pages_mapped,
            self._num_unmap_calls,
            self._map_ns,
        )

    def check(self) -> None:
        """Raise InvariantError where the books cannot be."""
        for slot, pages in enumerate(self._pages):
            if len(pages) > self.pages_per_slot:
                raise InvariantError(f"slot {slot} has {len(pages)} pages")
            if any(not NO_PAGE <= page < self._num_pages for page in pages):
                raise InvariantError(f"slot {slot} has a page that is not in the pool: {pages}")

    def _map_run(self, slot: int, index: int, page: int, count: int) -> None:
        mapped = self._pages[slot]
        # Nothing is known to be there until the call is back.
        mapped[index : index + count] = [NO_PAGE] * count
        address = self.address(slot) + index * self.page_bytes
        self._memory.map(address, page * self.page_bytes, count * self.page_bytes)
        mapped[index : index + count] = range(page, page + count)
        self._num_map_calls += 1
        self._num_pages_mapped += count

    def _check_range(self, slot: int, first_page: int, count: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise EngineError(f"slot {slot} of {self.num_slots}")
        if first_page < 0 or first_page + count > self.pages_per_slot:
            raise EngineError(
                f"slot {slot}: {count} pages from {first_page}, it has {self.pages_per_slot}"
            )


def _runs(mapped: Sequence[int], first: int, page_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index in the slot, length) of the runs of consecutive ids that are not mapped yet."""
    at, end = 0, len(page_ids)
    while at < end:
        if mapped[first + at] == page_ids[at]:
            at += 1
            continue
        stop = at + 1
        while (
            stop < end
            and page_ids[stop] == page_ids[stop - 1] + 1
            and mapped[first + stop] != page_ids[stop]
        ):
            stop += 1
        yield first + at, stop - at
        at = stop
