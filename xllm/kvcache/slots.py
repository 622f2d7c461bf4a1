"""Which pages are mapped under which slots, and which slot a sequence gets.

A slot is a contiguous range of addresses with a sequence's pages under it. A slot that is released
keeps its mappings: its pages are cached blocks or free ones (the pool knows), and the next
sequence that begins with them, or gets them anew, finds them mapped already. Mappings are a
resource as pages are: each run of consecutive pages takes one, and the rest of the slot another.
Pure: changes are collected as operations for the worker (`drain`). Invariants: the pages that a
sequence uses are mapped under its slot in its order; no more mappings are in use than allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from xllm.errors import InvariantError
from xllm.kvcache.mappings import MappedPages, differing
from xllm.kvcache.pages import PageState
from xllm.kvcache.slot_choice import MAX_CANDIDATES, SlotChoice, score
from xllm.protocol.step import MapPages


@dataclasses.dataclass(frozen=True, slots=True)
class SlotTableStatistics:
    """Slots in use, mappings as they are counted, and since the start: sequences that got a slot,
    their pages, how many of these were mapped there already, and mappings that were taken from
    idle slots because there were too many."""

    num_slots: int
    num_used: int
    num_mappings: int
    max_mappings: int
    num_pages: int
    num_pages_found: int
    num_reclaimed: int


class SlotTable:
    """Slots 0 to num_slots - 1 of `pages_per_slot` pages each."""

    def __init__(self, num_slots: int, pages_per_slot: int, max_mappings: int) -> None:
        """`max_mappings`: at least pages_per_slot + 2, or the longest sequence finds no room."""
        assert num_slots >= 1
        assert max_mappings >= pages_per_slot + 2
        self.num_slots = num_slots
        self.pages_per_slot = pages_per_slot
        self.max_mappings = max_mappings
        self._mapped = MappedPages(num_slots)
        self._length = [-1] * num_slots  # pages that its sequence uses; -1: idle
        self._num_used_mappings = 0
        self._suspect: set[int] = set()
        # Idle slots: those without pages, and the others, the longest idle first; these also
        # by their first page.
        self._empty = list(range(num_slots - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._by_first: dict[int, dict[int, None]] = {}
        self._num_pages = 0
        self._num_found = 0
        self._num_reclaimed = 0

    @property
    def num_idle(self) -> int:
        """Slots that `choose` can choose from."""
        return len(self._empty) + len(self._idle)

    def has_room(self, num_pages: int, leaving: Sequence[int] = ()) -> bool:
        """Whether a sequence of so many pages finds a slot and mappings, wherever they lie, once
        the slots `leaving` (in use, distinct) are released."""
        used = self._num_used_mappings - sum([self._mapped.count(slot) for slot in leaving])
        return self.num_idle + len(leaving) > 0 and used + num_pages + 2 <= self.max_mappings

    def choose(
        self, prefix: Sequence[int], num_pages: int, is_free: Callable[[int], bool]
    ) -> SlotChoice:
        """The idle slot for a sequence that begins with the pages `prefix` and needs `num_pages`
        in all: the one with the most of the prefix mapped, then with the most free pages where
        the others go. Mutates nothing. There must be an idle slot."""
        best, best_score = -1, (0, 0)
        for slot in self._candidates(prefix):
            found = score(self._mapped.under(slot), prefix, num_pages, is_free)
            if found > best_score:
                best, best_score = slot, found
        if best < 0:
            best = self._empty[-1] if self._empty else next(iter(self._idle))
        return SlotChoice(best, self._mapped.under(best)[len(prefix) : num_pages])

    def assign(self, slot: int, page_ids: Sequence[int]) -> bool:
        """Give an idle slot to a sequence with these pages and map those that are not there.
        Mutates; False, and the slot stays idle, where there are not enough mappings."""
        assert self._length[slot] < 0
        self._leave_idle(slot)
        self._length[slot] = 0
        self._num_used_mappings += self._mapped.count(slot)
        if not self._map(slot, 0, page_ids):
            self.release(slot)
            return False
        return True

    def extend(self, slot: int, page_ids: Sequence[int]) -> bool:
        """More pages behind those that the slot's sequence uses. Mutates; False, and nothing
        changes for the sequence, where there are not enough mappings."""
        return self._map(slot, self._length[slot], page_ids)

    def wanted_next(self, slot: int) -> int:
        """The page mapped behind those that the slot's sequence uses; -1: none."""
        mapped, length = self._mapped.under(slot), self._length[slot]
        return mapped[length] if length < len(mapped) else -1

    def release(self, slot: int) -> None:
        """Its sequence is gone; what is mapped stays mapped. Mutates."""
        assert self._length[slot] >= 0
        self._length[slot] = -1
        self._num_used_mappings -= self._mapped.count(slot)
        self._enter_idle(slot)
        if slot in self._suspect:
            self._suspect.discard(slot)
            self._cut(slot, 0)

    def distrust(self, slot: int) -> None:
        """Operations on a slot in use may not have been carried out: nothing of it is used again
        once it is released. Mutates."""
        self._suspect.add(slot)

    def drop_all(self) -> None:
        """Unmap all; no slot may be in use. Mutates. For a model that goes to sleep."""
        for slot in tuple(self._idle):
            self._cut(slot, 0)
        assert self.num_idle == self.num_slots

    def drain(self) -> tuple[MapPages, ...]:
        """The operations since the last call, in order."""
        return self._mapped.drain()

    def pages(self, slot: int) -> Sequence[int]:
        """The pages that the slot's sequence uses."""
        return self._mapped.under(slot)[: max(self._length[slot], 0)]

    def states(self, num_pages: int, is_free: Callable[[int], bool]) -> list[PageState]:
        """The state of each page of a pool. Costs time in proportion to it."""
        states = [
            PageState.FREE if is_free(page) else PageState.ALLOCATED for page in range(num_pages)
        ]
        for slot in range(self.num_slots):
            for page in self._mapped.under(slot):
                states[page] = PageState.REUSABLE
        for slot in range(self.num_slots):
            for page in self.pages(slot):
                states[page] = PageState.MAPPED
        return states

    def statistics(self) -> SlotTableStatistics:
        """A snapshot; does not mutate."""
        return SlotTableStatistics(
            self.num_slots,
            self.num_slots - self.num_idle,
            self._mapped.num_mappings,
            self.max_mappings,
            self._num_pages,
            self._num_found,
            self._num_reclaimed,
        )

    def check(self, used: Iterable[tuple[int, Sequence[int]]] | None = None) -> None:
        """Raise InvariantError where the counts contradict the pages; `used`: if given, the slot
        and the pages of every sequence that has one."""
        self._mapped.check()
        num_used = 0
        for slot, length in enumerate(self._length):
            mapped = self._mapped.under(slot)
            if len(mapped) > self.pages_per_slot or length > len(mapped):
                raise InvariantError(f"slot {slot}: {len(mapped)} pages, {length} are used")
            is_idle = length < 0
            num_used += 0 if is_idle else self._mapped.count(slot)
            is_listed = slot in self._idle
            is_found = slot in self._by_first.get(mapped[0] if mapped else -1, ())
            if not is_listed == is_found == (is_idle and bool(mapped)):
                raise InvariantError(f"slot {slot} is listed wrongly as idle")
            if (slot in self._empty) != (is_idle and not mapped):
                raise InvariantError(f"slot {slot} is listed wrongly as empty")
        if num_used != self._num_used_mappings:
            raise InvariantError(f"{self._num_used_mappings} mappings used, not {num_used}")
        if self._mapped.num_mappings > self.max_mappings:
            raise InvariantError(f"{self._mapped.num_mappings} mappings of {self.max_mappings}")
        if used is not None:
            self._check_used(used)

    def _check_used(self, used: Iterable[tuple[int, Sequence[int]]]) -> None:
        slots = set()
        for slot, page_ids in used:
            if slot in slots:
                raise InvariantError(f"slot {slot} is used twice")
            slots.add(slot)
            if list(self.pages(slot)) != list(page_ids):
                raise InvariantError(
                    f"slot {slot} has {self.pages(slot)} mapped for a sequence of {page_ids}"
                )
        if len(slots) != self.num_slots - self.num_idle:
            raise InvariantError(f"{len(slots)} slots are used, {self.num_idle} are idle")

    def _candidates(self, prefix: Sequence[int]) -> list[int]:
        """Idle slots worth a look: those that begin as the prefix does, the last released first;
        else those that are idle for the longest, whose pages are the likeliest to be free."""
        alike = self._by_first.get(prefix[0]) if prefix else None
        if alike:
            return [slot for slot, _ in zip(reversed(alike), range(MAX_CANDIDATES), strict=False)]
        return [slot for slot, _ in zip(self._idle, range(MAX_CANDIDATES), strict=False)]

    def _map(self, slot: int, first: int, page_ids: Sequence[int]) -> bool:
        """Map pages from `first` on, all that the sequence uses so far, and use them."""
        mapped = self._mapped.under(slot)
        end = first + len(page_ids)
        assert end <= self.pages_per_slot
        runs = differing(mapped[first:end], page_ids)
        num_fresh = sum([stop - begin for begin, stop in runs])
        if runs and not self._make_room(slot, first, page_ids):
            return False
        for begin, stop in runs:
            self._change(slot, first + begin, page_ids[begin:stop])
        self._length[slot] = end
        self._num_pages += len(page_ids)
        self._num_found += len(page_ids) - num_fresh
        return True

    def _make_room(self, slot: int, first: int, page_ids: Sequence[int]) -> bool:
        """Find mappings for pages under a slot in use: behind its own sequence first, then under
        the slots that are idle for the longest, then behind the other sequences."""
        room = self.max_mappings - self._mapped.num_mappings
        if len(page_ids) + 2 <= room:
            return True
        if self._mapped.growth(slot, first, page_ids, False) <= room:
            return True
        self._cut(slot, first + len(page_ids))
        while True:
            room = self.max_mappings - self._mapped.num_mappings
            missing = self._mapped.growth(slot, first, page_ids, True) - room
            if missing <= 0:
                return True
            if self._idle:
                victim = next(iter(self._idle))
                self._cut(victim, self._mapped.shortened(victim, missing))
            elif not self._cut_behind():
                return False

    def _cut_behind(self) -> bool:
        """Unmap what lies behind the sequences of slots in use; whether there was anything."""
        before = self._mapped.num_mappings
        for slot, length in enumerate(self._length):
            if length > 0:
                self._cut(slot, length)
        return self._mapped.num_mappings < before

    def _change(self, slot: int, first: int, page_ids: Sequence[int]) -> None:
        """Map pages under a slot in use."""
        before = self._mapped.count(slot)
        self._mapped.map(slot, first, page_ids)
        self._num_used_mappings += self._mapped.count(slot) - before

    def _cut(self, slot: int, first: int) -> None:
        """Unmap the pages of a slot from an index on."""
        is_idle = self._length[slot] < 0
        if is_idle:
            self._leave_idle(slot)
        before = self._mapped.count(slot)
        self._mapped.cut(slot, first)
        gone = before - self._mapped.count(slot)
        self._num_reclaimed += gone
        if is_idle:
            self._enter_idle(slot)
        else:
            self._num_used_mappings -= gone

    def _enter_idle(self, slot: int) -> None:
        mapped = self._mapped.under(slot)
        if mapped:
            self._idle[slot] = None
            self._by_first.setdefault(mapped[0], {})[slot] = None
        else:
            self._empty.append(slot)

    def _leave_idle(self, slot: int) -> None:
        mapped = self._mapped.under(slot)
        if not mapped:
            self._empty.remove(slot)
            return
        del self._idle[slot]
        alike = self._by_first[mapped[0]]
        del alike[slot]
        if not alike:
            del self._by_first[mapped[0]]
