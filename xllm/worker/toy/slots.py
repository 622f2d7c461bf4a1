"""What the toy engine has mapped under its slots: a list of pages each, and no memory.

It holds the master's maps against its block tables: what a real device would read through a slot
must be what the table names. Invariant: only `carry_out` changes what is mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xllm.errors import InvariantError
from xllm.protocol.step import MapPages


class ToySlots:
    """The slots that plans name. `num_slots`: how many the engine says to have."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._pages: dict[int, list[int]] = {}

    def clear(self) -> None:
        """Nothing is mapped any more."""
        self._pages.clear()

    def carry_out(self, maps: Iterable[MapPages]) -> None:
        """Map and unmap. InvariantError for pages behind a gap."""
        for one in maps:
            pages = self._pages.setdefault(one.slot, [])
            first = one.first_page
            if first > len(pages):
                raise InvariantError(f"slot {one.slot}: page {first} behind {len(pages)} mapped")
            if one.page_ids:
                pages[first : first + len(one.page_ids)] = one.page_ids
            else:
                del pages[first:]

    def verify(self, slot: int, blocks: Sequence[int]) -> None:
        """Raise InvariantError where other pages than these are mapped from a slot's start on."""
        mapped = self._pages.get(slot, [])[: len(blocks)]
        if mapped != blocks:
            raise InvariantError(f"slot {slot} has {mapped} mapped, the block table is {blocks}")
