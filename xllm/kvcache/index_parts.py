"""Which bit of the index stands for which publisher's tier, and what is counted of each. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from xllm.errors import InvalidRequestError

TIERS = ("device", "dram", "ssd")
WORD_BITS = 64


class CachedPrefix(NamedTuple):
    """Leading blocks of a prompt that a publisher has in each tier, each counted on its own."""

    device: int = 0
    dram: int = 0
    ssd: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class IndexPart:
    """What the index has of one publisher's tier."""

    publisher: str
    tier: int
    """Its number in TIERS."""
    number: int
    """Which bit it is: of column number // 64."""
    num_blocks: int = 0
    digest: int = 0
    """See `digest`; of the blocks that are counted. Worthless once it is not whole."""
    is_whole: bool = True
    """Nothing was left out for want of room, or for two blocks with one key."""

    @property
    def column(self) -> int:
        """Where its bit is."""
        return self.number // WORD_BITS

    @property
    def bit(self) -> int:
        """Its bit in its column."""
        return 1 << (self.number % WORD_BITS)


FEW_BITS = 12
"""So few are taken one by one."""
NUM_PREFIXES = 4096
"""Prefixes of which there is an object at hand."""


class PartTable:
    """All parts; a bit of one that is gone is given to the next."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], IndexPart] = {}
        self._by_number: list[IndexPart | None] = []
        self._hidden: set[str] = set()
        self.prefixes = [CachedPrefix(length) for length in range(NUM_PREFIXES)]
        """Of device tiers, by length."""
        self.alone: list[dict[int, str]] = []
        """By column, the publisher of each bit, where all parts are of device tiers."""
        self._owners: list[dict[int, tuple[str, int]]] = []
        """By column, publisher and tier of each bit."""
        self._all_device = True
        self.visible: list[int] = []
        """By column, the bits of parts that may be spoken of."""

    def __iter__(self) -> Iterator[IndexPart]:
        return iter(self._parts.values())

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def has_free_bit(self) -> bool:
        """Whether one more part needs no further column."""
        return len(self._parts) < len(self._by_number)

    def get(self, publisher: str, tier: str) -> IndexPart | None:
        """The part, if anything was said of it. InvalidRequestError for an unknown tier."""
        if tier not in TIERS:
            raise InvalidRequestError(f"tier must be one of {TIERS}, not {tier!r}", param="tier")
        return self._parts.get((publisher, TIERS.index(tier)))

    def add(self, publisher: str, tier: str) -> IndexPart:
        """A new part with a free bit, of which there must be one."""
        number = self._by_number.index(None)
        part = IndexPart(publisher, TIERS.index(tier), number)
        self._parts[publisher, part.tier] = self._by_number[number] = part
        self._see(publisher)
        self.changed()
        return part

    def add_column(self) -> None:
        """Bits for 64 more."""
        self._by_number += [None] * WORD_BITS
        self.visible.append(0)
        self.alone.append({})
        self._owners.append({})

    def of(self, publisher: str) -> list[IndexPart]:
        """A publisher's parts."""
        found = (self._parts.get((publisher, tier)) for tier in range(len(TIERS)))
        return [part for part in found if part is not None]

    def of_column(self, column: int) -> list[IndexPart]:
        """The parts whose bits are there."""
        first = column * WORD_BITS
        return [part for part in self._by_number[first : first + WORD_BITS] if part is not None]

    def remove(self, part: IndexPart) -> None:
        """Its bit is free; nothing may be stored under it any more."""
        del self._parts[part.publisher, part.tier]
        self._by_number[part.number] = None
        self.visible[part.column] &= ~part.bit
        if not self.of(part.publisher):
            self._hidden.discard(part.publisher)

    def hide(self, publisher: str, hidden: bool) -> None:
        """Whether a publisher's parts may be spoken of."""
        if hidden:
            self._hidden.add(publisher)
        else:
            self._hidden.discard(publisher)
        self._see(publisher)

    def _see(self, publisher: str) -> None:
        for part in self.of(publisher):
            if publisher in self._hidden:
                self.visible[part.column] &= ~part.bit
            else:
                self.visible[part.column] |= part.bit

    def note(self, column: int, mask: int, length: int, found: dict[str, CachedPrefix]) -> None:
        """Write down that the parts of these bits have so many leading blocks."""
        prefix = self.prefixes[length] if length < NUM_PREFIXES else CachedPrefix(length)
        if self._all_device:
            alone = self.alone[column]
            if mask.bit_count() > FEW_BITS:
                found.update(dict.fromkeys([alone[bit] for bit in alone if bit & mask], prefix))
                return
            while mask:
                found[alone[mask & -mask]] = prefix
                mask &= mask - 1
            return
        for bit, (publisher, tier) in self._owners[column].items():
            if bit & mask:
                lengths = list(found.get(publisher) or CachedPrefix())
                lengths[tier] = length
                found[publisher] = CachedPrefix(*lengths)

    def changed(self) -> None:
        """Parts came or went."""
        self._all_device = not any(part.tier for part in self)
        self.alone = [{} for _ in self.visible]
        self._owners = [{} for _ in self.visible]
        if self._all_device:
            for part in self:
                self.alone[part.column][part.bit] = part.publisher
        for part in self:
            self._owners[part.column][part.bit] = (part.publisher, part.tier)
