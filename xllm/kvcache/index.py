"""The global KV index: which publisher (an instance, a node's daemon) has which blocks cached.

Content hashes are cut to their first eight bytes. Two of n blocks share a key with probability
n^2 / 2^65 (3e-6 for ten million), and a hash that nobody has is taken for one that somebody has
with n / 2^64: a false hit costs a wrong route, never a wrong token, since engines match whole
hashes. Keys are multiplied by a secret odd number first, so that nobody can choose prompts that
crowd one place of the table.

One bit stands for a publisher's tier (a *part*); `index_match` says how prefixes are found.

Memory: a block has 9 bytes and 8 more for each 64 parts, and 8 a place of the hash, of which 42 to
60% are taken: 35 to 50 bytes for a distinct block with up to 64 parts, 70 while the table is
renewed, never more than `max_bytes` all together. At that limit the blocks stored or asked
for longest ago go, a tenth of all at a time, and the parts that lost some are no longer *whole*:
what is said of them may be too little, never too much. Pure; not for threads.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm.errors import InvalidRequestError, InvariantError
from xllm.kvcache.block_hash import Slots, Words
from xllm.kvcache.block_table import BlockTable, Flags
from xllm.kvcache.index_keys import first_words, hash_keys, table_keys
from xllm.kvcache.index_match import match_chain
from xllm.kvcache.index_parts import CachedPrefix, IndexPart, PartTable

PIECE = 8192
"""Blocks that are worked on at once: their rows fit a second-level cache."""
DROP_SHARE = 10
"""One in so many goes when room is needed."""


@dataclasses.dataclass(frozen=True, slots=True)
class IndexStatistics:
    """A snapshot. `num_keys`: distinct blocks; `num_entries`: blocks by publisher and tier."""

    num_keys: int
    num_entries: int
    num_bytes: int
    max_bytes: int
    num_dropped: int
    num_events: int
    num_rebuilt: int


class KvIndex:
    """`max_bytes`: see the module. `multiplier`: a secret, random, odd number of 64 bits."""

    def __init__(self, max_bytes: int, multiplier: int = 0x9E3779B97F4A7C15) -> None:
        if not multiplier % 2 or not 0 < multiplier < 1 << 64:
            raise InvalidRequestError(
                "multiplier must be odd and have at most 64 bits", param="multiplier"
            )
        self._max_bytes = max_bytes
        self._secret = multiplier
        self._multiplier = np.uint64(multiplier)
        self._table = BlockTable(max_bytes)
        self._parts = PartTable()
        self._num_keys = 0
        self._num_events = 0
        self._num_dropped = 0

    # -- what publishers say -----------------------------------------------------------------

    def apply(
        self, publisher: str, stored: bytes = b"", removed: bytes = b"", tier: str = "device"
    ) -> None:
        """Blocks came and went, as concatenated hashes; first those that went. Blocks that are
        stored again, or removed and not there, change nothing. InvalidRequestError for a tier or
        a length that cannot be; nothing has happened then."""
        added = hash_keys(stored, "stored")
        gone = hash_keys(removed, "removed")
        part = self._part(publisher, tier)
        self._num_events += len(added) + len(gone)
        for start in range(0, len(gone), PIECE):
            self._remove(part, gone[start : start + PIECE])
        self._store_all(part, added)

    def replace(self, publisher: str, tier: str, hashes: bytes) -> None:
        """The publisher has these blocks in the tier, and no others."""
        keys = hash_keys(hashes)
        part = self._part(publisher, tier)
        self._clear(part)
        self._store_all(part, keys)
        if part.num_blocks != len(keys):
            part.is_whole = False

    def forget(self, publisher: str) -> None:
        """The publisher is gone, and what it had."""
        for part in self._parts.of(publisher):
            self._clear(part)
            self._parts.remove(part)
        self._parts.hide(publisher, False)

    def hide(self, publisher: str, hidden: bool = True) -> None:
        """Whether what the publisher has is not known at present: `match` does not speak of it."""
        self._parts.hide(publisher, hidden)

    # -- questions ---------------------------------------------------------------------------

    def match(self, hashes: bytes) -> dict[str, CachedPrefix]:
        """How many leading blocks of a chain each publisher has, by tier; those that have the
        first in no tier are left out."""
        words = first_words(hashes)
        if not len(words) or not self._table.find_one(self._key_of(int(words[0]))):
            return {}
        return match_chain(self._table, self._parts, table_keys(words, self._multiplier))

    def part(self, publisher: str, tier: str) -> IndexPart | None:
        """What is known of a publisher's tier; not to be changed."""
        return self._parts.get(publisher, tier)

    def statistics(self) -> IndexStatistics:
        """Counts as they are now."""
        return IndexStatistics(
            num_keys=self._num_keys,
            num_entries=sum(part.num_blocks for part in self._parts),
            num_bytes=self._table.num_bytes,
            max_bytes=self._max_bytes,
            num_dropped=self._num_dropped,
            num_events=self._num_events,
            num_rebuilt=self._table.num_rebuilt,
        )

    @property
    def is_full(self) -> bool:
        """Whether blocks had to be dropped that a publisher still has."""
        return any(not part.is_whole for part in self._parts) and self._num_dropped > 0

    @property
    def is_renewing(self) -> bool:
        """Whether entries of the table are on their way to another place."""
        return self._table.is_renewing

    def check(self) -> None:
        """InvariantError where counts and rows do not fit together."""
        self._table.check()
        for part in self._parts:
            column = self._table.columns[part.column]
            bit = np.uint64(part.bit)
            num_blocks = sum(
                int(np.count_nonzero(column[used] & bit)) for used in self._table.ranges()
            )
            if num_blocks != part.num_blocks:
                raise InvariantError(f"{part} has {num_blocks} blocks")
        if self._table.count_live() != self._num_keys:
            raise InvariantError(f"{self._num_keys} keys are not what there is")

    def _key_of(self, word: int) -> int:
        """`table_keys` of one."""
        return (word or 1) * self._secret & 0xFFFF_FFFF_FFFF_FFFF

    # -- parts -------------------------------------------------------------------------------

    def _part(self, publisher: str, tier: str) -> IndexPart:
        part = self._parts.get(publisher, tier)
        if part is None:
            if not self._parts.has_free_bit:
                self._parts.add_column()
                self._table.add_column()
                if self._table.is_too_large:
                    self._make_room(0)
                    self._table.finish()
            part = self._parts.add(publisher, tier)
        return part

    def _clear(self, part: IndexPart) -> None:
        column = self._table.columns[part.column]
        if part.num_blocks:
            for used in self._table.ranges():
                column[used] &= np.uint64(~part.bit & 0xFFFF_FFFF_FFFF_FFFF)
            self._num_keys = self._table.count_live()
        part.num_blocks = part.digest = 0
        part.is_whole = True

    # -- changes -----------------------------------------------------------------------------

    def _store_all(self, part: IndexPart, keys: Words) -> None:
        size = min(PIECE, self._table.max_live // 2)
        for start in range(0, len(keys), size):
            self._store(part, keys[start : start + size])

    def _store(self, part: IndexPart, keys: Words) -> None:
        if not self._table.has_room(len(keys)):
            self._make_room(len(keys))
        self._table.move(len(keys))
        slots = self._table.put(keys * self._multiplier)
        words = self._table.columns[part.column][slots]
        self._flip(part, keys, slots, words, (words & np.uint64(part.bit)) == 0)

    def _remove(self, part: IndexPart, keys: Words) -> None:
        slots = self._table.find(keys * self._multiplier)
        words = self._table.columns[part.column][slots]
        held = (words & np.uint64(part.bit)) != 0
        self._flip(part, keys, slots, words, held)

    def _flip(
        self, part: IndexPart, keys: Words, slots: Slots, words: Words, chosen: Flags
    ) -> None:
        """Change the part's bit in the chosen slots, all of which have or all of which lack it.
        `words`: what is there of its column."""
        column = self._table.columns[part.column]
        if not chosen.all():
            keys, slots, words = keys[chosen], slots[chosen], words[chosen]
        # A block that is named twice counts once: of equal slots, the last to write stays.
        order = np.arange(len(slots), dtype=np.uint64)
        column[slots] = order
        once = column[slots] == order
        bit = np.uint64(part.bit)
        after = words ^ bit
        column[slots] = after
        if not once.all():
            keys, slots, words, after = keys[once], slots[once], words[once], after[once]
        if not len(slots):
            return
        added = not int(words[0]) & part.bit
        part.num_blocks += len(slots) if added else -len(slots)
        part.digest ^= int(np.bitwise_xor.reduce(keys))
        if added:
            self._num_keys += self._num_empty_beside(slots[words == 0], column)
        else:
            self._num_keys -= self._num_empty_beside(slots[after == 0], column)

    def _num_empty_beside(self, slots: Slots, column: Words) -> int:
        """Of slots, how many have an empty row apart from this column."""
        for other in self._table.columns:
            if other is not column:
                slots = slots[other[slots] == 0]
        return len(slots)

    def _make_room(self, count: int) -> None:
        excess = self._num_keys + count - self._table.max_live
        if excess > 0:
            self._drop(max(excess, self._num_keys // DROP_SHARE))
        self._table.renew(self._num_keys, count)

    def _drop(self, count: int) -> None:
        """Forget the blocks that nobody stored or asked for longest."""
        slots = self._table.oldest(count)
        for number, column in enumerate(self._table.columns):
            words = column[slots]
            column[slots] = 0
            for part in self._parts.of_column(number):
                lost = int(np.count_nonzero(words & np.uint64(part.bit)))
                part.num_blocks -= lost
                part.is_whole &= not lost
        self._num_keys -= len(slots)
        self._num_dropped += len(slots)
