"""From 64-bit keys to sets of small numbers, in the order in which the keys came.

An entry of the *log* is a key, its set (a row of 64-bit words in columns) and when it was used
last; `BlockHash` says where in the log a key is. Blocks of a prompt are stored one behind the
other, so whoever follows a chain finds most of it in one piece of memory.

A key whose row is empty keeps its entry until the log is *renewed*: entries with a row are moved,
in their order, into the other half of the log and a new hash, a few thousand each time that keys
are put. Until all are there, a key is in one of the two halves; new ones go to the new one.
Invariants: a key is in the log at most once; entries that are not in use are zeros. Pure; not for
threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from xllm.errors import InvariantError
from xllm.kvcache.block_hash import MAX_POSITION, SPILL, BlockHash, Slots, Words
from xllm.kvcache.zero_pages import ZeroPages

MIN_HOMES = 1024
MAX_LOAD = 0.60
"""Share of the homes in use, dead ones included, at which the log is renewed."""
TARGET_LOAD = 0.42
"""Share in use after that, where the limit of bytes allows it."""
FULL_LOAD = 0.50
"""Share of living keys that a table at its limit of bytes may have: what is left is room for the
changes between two renewals."""
MOVED = 4096
"""Entries that are moved at least, where any are, each time that keys are put."""
MOVED_EACH = 8
"""Entries that are moved for each key that may be new: renewing ends before it is due again."""
PAD = 64
"""Entries that nobody has, behind those of each half."""
_MAX_AGE = 255
Flags = npt.NDArray[np.bool_]


class BlockTable:
    """`max_bytes`: of all memory, while the log is renewed, too."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.columns: list[Words] = []
        self._half = min(int(self._max_homes * MAX_LOAD * 1.25) + PAD, MAX_POSITION // 2 - PAD)
        self._keys_pages = ZeroPages(self._num_positions, np.uint64)
        self._used_pages = ZeroPages(self._num_positions, np.uint8)
        self._column_pages: list[ZeroPages] = []
        self.keys: Words = self._keys_pages.array.view(np.uint64)
        """Of the log, by position."""
        self._used: npt.NDArray[np.uint8] = self._used_pages.array.view(np.uint8)
        self._age = 0
        self._num_aged = 0
        self.num_rebuilt = 0
        self._hash = BlockHash(MIN_HOMES, self.keys)
        self._start = self._head = PAD
        self._old: BlockHash | None = None
        self._origin = self._tail = self._border = 0
        """The old half: where it begins, what is left of it."""

    @property
    def num_bytes(self) -> int:
        """Of the tables and of the entries in use."""
        tables = self._hash.num_bytes + (self._old.num_bytes if self._old is not None else 0)
        entries = self._head - self._start + self._border - self._tail
        return tables + entries * self._entry_bytes

    @property
    def max_live(self) -> int:
        """How many keys with a row fit the limit of bytes."""
        return int(self._max_homes * FULL_LOAD)

    @property
    def is_pressed(self) -> bool:
        """Whether blocks may have to be dropped before long: what is asked for is worth noting."""
        return 4 * self.num_bytes > self._max_bytes

    @property
    def is_renewing(self) -> bool:
        """Whether entries are still to be moved."""
        return self._old is not None

    @property
    def is_too_large(self) -> bool:
        """Whether a table has more homes than the limit of bytes allows for rows of this width."""
        most = max(one.num_homes for one in (self._hash, self._old or self._hash))
        return most > self._max_homes

    @property
    def _entry_bytes(self) -> int:
        return 8 + 1 + 8 * max(1, len(self.columns))

    @property
    def _max_homes(self) -> int:
        # Two hashes of 8 bytes a slot, and what MOVED_EACH lets the log grow to meanwhile.
        bytes_each = 16 + MAX_LOAD * (1 + 1 / MOVED_EACH) * self._entry_bytes
        return max(MIN_HOMES, int((self._max_bytes - 16 * SPILL) / bytes_each))

    @property
    def _num_positions(self) -> int:
        return 2 * (self._half + PAD) + PAD

    # -- looking up --------------------------------------------------------------------------

    nowhere = 0
    """A position whose row is always empty."""

    def find(self, keys: Words) -> Slots:
        """The position of each key; `nowhere` of those that are not there."""
        found = self._together(keys)
        if found is None:
            found = self._hash.find(keys)
            if self._old is not None:
                missing = (found == self.nowhere).nonzero()[0]
                if len(missing):
                    found[missing] = self._old.find(keys[missing])
        return found

    def _together(self, keys: Words) -> Slots | None:
        """The same where the keys lie one behind the other or, as blocks of a prompt are evicted,
        one before the other."""
        start = self.find_one(int(keys[0])) if len(keys) else 0
        if not start:
            return None
        stop = start + len(keys)
        if stop <= len(self.keys) and (self.keys[start:stop] == keys).all():
            return np.arange(start, stop)
        stop = start - len(keys)
        if stop >= 0 and (self.keys[start:stop:-1] == keys).all():
            return np.arange(start, stop, -1)
        return None

    def find_one(self, key: int) -> int:
        """The position of one key, or `nowhere`."""
        found = self._hash.find_one(key)
        if not found and self._old is not None:
            found = self._old.find_one(key)
        return found

    def run(self, keys: Words) -> slice:
        """Where the first keys of these are, one behind the other, as many as lie so; nothing where
        the first is nowhere."""
        start = self.find_one(int(keys[0]))
        if not start:
            return slice(0, 0)
        there = self.keys[start : start + len(keys)]
        differs = there != keys[: len(there)]
        length = int(differs.argmax()) or len(there)
        return slice(start, start + length)

    def touch(self, slots: slice | Slots) -> None:
        """These were asked for."""
        self._used[slots] = self._age

    def ranges(self) -> Iterator[slice]:
        """The positions that are in use, the older ones first."""
        if self._border > self._tail:
            yield slice(self._tail, self._border)
        yield slice(self._start, self._head)

    def count_live(self) -> int:
        """How many keys have a row that is not empty."""
        return sum(int(np.count_nonzero(self._live(one))) for one in self.ranges())

    def oldest(self, count: int) -> Slots:
        """So many living entries (or all), those first that were not used for longest."""
        slots = np.concatenate([np.flatnonzero(self._live(x)) + x.start for x in self.ranges()])
        ages = self._used[slots]
        reached = np.bincount(ages, minlength=_MAX_AGE + 1).cumsum()
        last = int(np.searchsorted(reached, count))
        if last > _MAX_AGE:
            return slots
        older, same = slots[ages < last], slots[ages == last]
        return np.concatenate((older, same[: count - len(older)]))

    def _live(self, part: slice) -> Flags:
        found: Flags = np.zeros(part.stop - part.start, np.bool_)
        for column in self.columns:
            found |= column[part] != 0
        return found

    # -- adding ------------------------------------------------------------------------------

    def put(self, keys: Words) -> Slots:
        """The position of each key, which is there from now on, marked as used. There must be room
        for them (`has_room`)."""
        slots = self.find(keys)
        missing = (slots == self.nowhere).nonzero()[0]
        if len(missing):
            slots[missing] = self._append(keys[missing])
        self._used[slots] = self._age
        self._num_aged += len(keys)
        if self._num_aged * 16 > self._hash.num_homes:
            self._grow_older()
        return slots

    def has_room(self, count: int) -> bool:
        """Whether so many new keys can be put without renewing the log."""
        return self._head - self._start + count <= MAX_LOAD * self._hash.num_homes

    def _append(self, keys: Words) -> Slots:
        """New entries, of which equal ones become one."""
        slots = np.arange(self._head, self._head + len(keys))
        self._head += len(keys)
        self.keys[slots[0] : self._head] = keys
        found = self._hash.insert(keys, slots)
        doubled = slots[found != slots]
        if len(doubled):
            self.keys[doubled] = 0
        return found

    def add_column(self) -> None:
        """One more word for each row, empty. To be renewed at once where `is_too_large`."""
        pages = ZeroPages(self._num_positions, np.uint64)
        self._column_pages.append(pages)
        self.columns.append(pages.array.view(np.uint64))

    # -- room --------------------------------------------------------------------------------

    def renew(self, num_live: int, count: int) -> None:
        """Begin to leave out the keys without a row and make room for `count` more beside
        `num_live`, as far as the limit of bytes allows. Moves no entry yet."""
        self.finish()
        self._origin, self._tail, self._border = self._start, self._start, self._head
        other = self._half + 2 * PAD
        self._start = self._head = PAD if self._start == other else other
        wanted = int((num_live + count) / TARGET_LOAD) + 1
        num_homes = min(max(wanted, MIN_HOMES), self._max_homes)
        self._old, self._hash = self._hash, BlockHash(num_homes, self.keys)
        self.num_rebuilt += 1

    def move(self, num_new: int) -> None:
        """Go on with renewing, as far as is due before so many keys are put; nothing if it is
        done. Positions of entries that are moved are others then."""
        if self._old is not None:
            self._move(max(MOVED, MOVED_EACH * num_new))

    def finish(self) -> None:
        """Move all that is left."""
        while self._old is not None:
            self._move(self._border - self._tail)

    def _move(self, count: int) -> None:
        first, last = self._tail, min(self._border, self._tail + count)
        kept = np.flatnonzero(self._live(slice(first, last))) + first
        if len(kept):
            keys = self.keys[kept]
            rows = [column[kept] for column in self.columns]
            used = self._used[kept]
            # No key is in the log twice: not even for a moment, as they are compared there.
            self.keys[first:last] = 0
            slots = self._append(keys)
            for column, row in zip(self.columns, rows, strict=True):
                column[slots] = row
            self._used[slots] = used
        for pages in (self._keys_pages, self._used_pages, *self._column_pages):
            pages.clear(first, last, self._origin)
        self._tail = last
        if last == self._border:
            self._old = None

    def _grow_older(self) -> None:
        """What is used from now on counts as more recent than all before."""
        self._num_aged = 0
        self._age += 1
        if self._age > _MAX_AGE:
            for part in self.ranges():
                self._used[part] >>= np.uint8(1)
            self._age = (_MAX_AGE + 1) // 2

    def check(self) -> None:
        """InvariantError where a key with a row cannot be found."""
        for part in self.ranges():
            slots = np.flatnonzero(self._live(part)) + part.start
            if (self.keys[slots] == 0).any():
                raise InvariantError("an entry without a key has a row")
            if (self.find(self.keys[slots]) != slots).any():
                raise InvariantError("a key is not found where it lies")
        in_use = sum(int(np.count_nonzero(self.keys[part])) for part in self.ranges())
        if np.count_nonzero(self.keys) != in_use:
            raise InvariantError("entries that are not in use have keys")
