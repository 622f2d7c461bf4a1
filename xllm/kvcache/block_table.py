"""An open hash table from 64-bit keys to sets of small numbers, worked on in whole batches.

The set of a key is a row of 64-bit words in columns, the first of which lies beside the keys. A key
is in the first slot from its home on that was free (linear probing): most are at home, and a batch
of a thousand is a handful of numpy calls. The home is the key scaled to the number of slots: keys
are thus laid out almost in their order, and building the table anew is a sort and one running
maximum.

A key whose row is empty keeps its slot until the next rebuilding.
Invariant: no slot between a key's home and its place is empty. Pure; not for threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from xllm.errors import InvariantError

Words = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

MIN_SLOTS = 1024
SPILL = 512
"""Slots after the last home, for what does not fit there."""
MAX_LOAD = 0.50
"""Share of the slots in use, dead ones included, at which the table is built anew."""
TARGET_LOAD = 0.33
"""Share in use after that, where the limit of bytes allows it."""
FULL_LOAD = 0.42
"""Share of living keys that a table at its limit of bytes may have: what is left is room for the
changes between two rebuildings."""
NEAR = 4
"""Slots behind its home in which a key is looked for one by one."""
FEW = 16
"""So few keys are not worth a turn of their own."""
WINDOW = 8
"""Slots that are looked at together where a key is not there."""
_HALF = np.uint64(32)
_MAX_AGE = 255


class BlockTable:
    """`max_bytes`: of the arrays at rest; a rebuilding has the living keys twice for its time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.columns: list[Words] = []
        self._age = 0
        self._num_aged = 0
        self.num_rebuilt = 0
        self._allocate(MIN_SLOTS)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return self._num_slots * self._slot_bytes

    @property
    def max_live(self) -> int:
        """How many keys with a row fit the limit of bytes."""
        return int(self._max_homes * FULL_LOAD)

    @property
    def nowhere(self) -> int:
        """A slot whose row is always empty."""
        return self._num_slots - 1

    @property
    def is_pressed(self) -> bool:
        """Whether blocks may have to be dropped before long: what is asked for is worth noting."""
        return 2 * self.num_bytes > self._max_bytes

    @property
    def _slot_bytes(self) -> int:
        return 8 + 1 + 8 * max(1, len(self.columns))

    @property
    def _num_slots(self) -> int:
        return self._num_homes + SPILL

    @property
    def _max_homes(self) -> int:
        return max(MIN_SLOTS, self._max_bytes // self._slot_bytes - SPILL)

    # -- looking up --------------------------------------------------------------------------

    def find(self, keys: Words) -> Slots:
        """The slot of each key; `nowhere` of those that are not there."""
        return self._search(keys, self._homes(keys))

    def touch(self, slots: Slots) -> None:
        """These were asked for."""
        self._used[slots] = self._age

    def live(self) -> Flags:
        """Which slots have a row that is not empty."""
        found: Flags = np.zeros(self._num_slots, np.bool_)
        for column in self.columns:
            found |= column != 0
        return found

    def oldest(self, count: int) -> Slots:
        """So many living slots (or all), those first that were not used for longest."""
        slots = np.flatnonzero(self.live())
        ages = self._used[slots]
        reached = np.bincount(ages, minlength=_MAX_AGE + 1).cumsum()
        last = int(np.searchsorted(reached, count))
        if last > _MAX_AGE:
            return slots
        older, same = slots[ages < last], slots[ages == last]
        return np.concatenate((older, same[: count - len(older)]))

    def _homes(self, keys: Words) -> Slots:
        scaled = (keys >> _HALF) * np.uint64(self._num_homes)
        return (scaled >> _HALF).view(np.int64).astype(np.intp, copy=False)

    def _search(self, keys: Words, homes: Slots) -> Slots:
        """Almost all keys are in one of the first slots from their homes."""
        found = homes.copy()
        todo = np.flatnonzero(self._keys[homes] != keys)
        for _ in range(NEAR):
            if len(todo) <= FEW:
                break
            at = found[todo] + 1
            found[todo] = at
            todo = todo[self._keys[at] != keys[todo]]
        if len(todo):
            found[todo] = self._search_far(keys[todo], homes[todo])
        return found

    def _search_far(self, keys: Words, at: Slots) -> Slots:
        """Several slots at once; an empty one says that a key is not there."""
        found: Slots = np.full(len(keys), self.nowhere, np.intp)
        todo: Slots = np.arange(len(keys))
        while True:
            rows = self._windows[at]
            hits = np.flatnonzero(rows == keys[:, None])
            row = hits // WINDOW
            found[todo[row]] = at[row] + (hits & (WINDOW - 1))
            if len(hits) == len(todo):
                return found
            missed = np.flatnonzero(found[todo] == self.nowhere)
            further = missed[(rows[missed] != 0).all(axis=1)]
            if not len(further):
                return found
            todo, at, keys = todo[further], at[further] + WINDOW, keys[further]

    # -- adding ------------------------------------------------------------------------------

    def put(self, keys: Words) -> Slots:
        """The slot of each key, which is there from now on, marked as used. There must be room
        for them (`has_room`)."""
        homes = self._homes(keys)
        slots = self._search(keys, homes)
        missing = np.flatnonzero(slots == self.nowhere)
        if len(missing):
            slots[missing] = self._insert(keys[missing], homes[missing])
        self._used[slots] = self._age
        self._num_aged += len(keys)
        if self._num_aged * 16 > self._num_slots:
            self._grow_older()
        return slots

    def has_room(self, count: int) -> bool:
        """Whether so many new keys can be put without a rebuilding."""
        return self._num_taken + count <= MAX_LOAD * self._num_homes

    def _insert(self, keys: Words, at: Slots) -> Slots:
        slots: Slots = np.empty(len(keys), np.intp)
        todo: Slots = np.arange(len(keys))
        while len(todo):
            rows = self._windows[at]
            offset = (rows == 0).argmax(axis=1)
            is_free = rows[np.arange(len(rows)), offset] == 0
            places = at + offset
            chosen, wanted = places[is_free], keys[todo[is_free]]
            self._keys[chosen] = wanted
            slots[todo] = places
            # Two keys may have chosen one slot: the last to write has it. Equal keys share it,
            # and count twice, which only brings the next rebuilding forward.
            is_placed = is_free.copy()
            is_placed[is_free] = self._keys[chosen] == wanted
            self._num_taken += int(np.count_nonzero(is_placed))
            rest = np.flatnonzero(~is_placed)
            at = np.where(is_free[rest], at[rest], at[rest] + WINDOW)
            todo = todo[rest]
        return slots

    def add_column(self) -> None:
        """One more word for each row, empty. `rebuild` is due where `num_bytes` is now above the
        limit."""
        more = np.zeros(self._num_slots, np.uint64)
        self.columns.append(more if self.columns else self._pairs[:, 1])

    # -- room --------------------------------------------------------------------------------

    def rebuild(self, count: int) -> None:
        """Leave out the keys without a row and make room for `count` more, as far as the limit of
        bytes allows. Moves every slot."""
        kept = np.flatnonzero(self.live())
        old_keys = self._keys[kept]
        order = np.argsort(old_keys, kind="stable")
        kept, keys = kept[order], old_keys[order]
        rows = [column[kept] for column in self.columns]
        used = self._used[kept]
        wanted = int((len(keys) + count) / TARGET_LOAD) + 1
        self._allocate(min(max(wanted, MIN_SLOTS), self._max_homes))
        # In their order, each key goes to its home or right behind the one before it.
        index = np.arange(len(keys))
        places = np.maximum.accumulate(self._homes(keys) - index) + index
        if len(places) and int(places[-1]) >= self._num_slots - 2 * WINDOW:
            raise InvariantError("keys crowd at the table's end")
        self._keys[places] = keys
        self._used[places] = used
        for column, row in zip(self.columns, rows, strict=True):
            column[places] = row
        self._num_taken = len(keys)
        self.num_rebuilt += 1

    def _allocate(self, num_homes: int) -> None:
        self._num_homes = num_homes
        # A key lies beside its first word: both come with one line of the memory.
        self._pairs: Words = np.zeros((self._num_slots, 2), np.uint64)
        self._keys: Words = self._pairs[:, 0]
        self._windows = sliding_window_view(self._keys, WINDOW)
        self._used: npt.NDArray[np.uint8] = np.zeros(self._num_slots, np.uint8)
        num_columns = len(self.columns)
        self.columns = []
        for _ in range(num_columns):
            self.add_column()
        self._num_taken = 0

    def _grow_older(self) -> None:
        """What is used from now on counts as more recent than all before."""
        self._num_aged = 0
        self._age += 1
        if self._age > _MAX_AGE:
            self._used >>= np.uint8(1)
            self._age = (_MAX_AGE + 1) // 2

    def check(self) -> None:
        """InvariantError where a key with a row cannot be found."""
        flat = self._keys
        slots = np.flatnonzero(self.live())
        if (flat[slots] == 0).any():
            raise InvariantError("a slot without a key has a row")
        if (self.find(flat[slots]) != slots).any():
            raise InvariantError("a key is not found where it lies")
        if np.count_nonzero(flat) > self._num_taken:
            raise InvariantError("more slots are taken than are counted")
