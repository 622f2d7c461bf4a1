"""Where in a log the entry of a 64-bit key lies: an open hash table, worked on in whole batches.

A slot has 8 bytes: 32 bits of the key, and the position of its entry, which has the whole key and
is compared with it. A key is in the first slot from its home on that was free (linear probing).
Slots are never emptied: a table is filled, and then replaced. Position 0 is nobody's.
Invariant: no slot between a key's home and its place is empty. Pure; not for threads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

Words = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.intp]

SPILL = 512
"""Slots after the last home, for what does not fit there."""
WINDOW_BITS = 3
WINDOW = 1 << WINDOW_BITS
"""Slots that are looked at together where a key is not at home."""
MAX_POSITION = (1 << 32) - 1
_HALF = np.uint64(32)
_POSITION = np.uint64(MAX_POSITION)


class BlockHash:
    """`num_homes`: where keys would be without others; `log`: the entries' keys, by position."""

    def __init__(self, num_homes: int, log: Words) -> None:
        self.num_homes = num_homes
        self._scale = np.uint64(num_homes)
        self._log = log
        self._slots: Words = np.zeros(num_homes + SPILL, np.uint64)
        # From each slot on so many: a row is copied as one piece.
        self._windows: Words = sliding_window_view(self._slots, WINDOW)
        # One element of these takes a third of the time.
        self._slot_view, self._log_view = self._slots.data, log.data

    @property
    def num_bytes(self) -> int:
        """Of the table."""
        return self._slots.nbytes

    def find(self, keys: Words) -> Slots:
        """The position of each key; 0 of those that are not there."""
        marks = keys << _HALF
        homes = self._homes(keys)
        # Where the bits are the key's, what is left is the position.
        words = self._slots[homes]
        words ^= marks
        away = (words > _POSITION).nonzero()[0]
        if len(away):
            # Nobody is behind an empty home.
            others = words[away]
            words[away] = 0
            behind = away[others != marks[away]]
            if len(behind):
                words[behind] = self._find_behind(marks[behind], homes[behind] + 1)
        found = words.view(np.int64).astype(np.intp, copy=False)
        wrong = (self._log[found] != keys).nonzero()[0]
        if len(wrong):
            wrong = wrong[found[wrong] != 0]
            if len(wrong):
                found[wrong] = self._find_each(keys[wrong], homes[wrong])
        return found

    def find_one(self, key: int) -> int:
        """The position of one key, or 0."""
        at = (key >> 32) * self.num_homes >> 32
        mark = key & MAX_POSITION
        while word := self._slot_view[at]:
            if word >> 32 == mark:
                position: int = word & MAX_POSITION
                if self._log_view[position] == key:
                    return position
            at += 1
        return 0

    def insert(self, keys: Words, positions: Slots) -> Slots:
        """Put keys that are not there, and whose entries are. Of equal ones one is put; returned is
        the position of that for each."""
        found = positions.copy()
        values = keys << _HALF
        values |= positions.view(np.uint64)
        at = self._homes(keys)
        todo: Slots = np.arange(len(keys))
        while True:
            free = (self._slots[at] == 0).nonzero()[0]
            self._slots[at[free]] = values[free]
            # Two may have chosen one slot: the last to write has it.
            now = self._slots[at]
            rest = (now != values).nonzero()[0]
            if not len(rest):
                return found
            theirs = (now[rest] & _POSITION).view(np.int64)
            is_equal = self._log[theirs] == keys[rest]
            if is_equal.any():
                found[todo[rest[is_equal]]] = theirs[is_equal]
                rest = rest[~is_equal]
            todo, keys, values, at = todo[rest], keys[rest], values[rest], at[rest]
            at = self._free_behind(at)

    def _homes(self, keys: Words) -> Slots:
        homes = keys >> _HALF
        homes *= self._scale
        homes >>= _HALF
        return homes.view(np.int64).astype(np.intp, copy=False)

    def _free_behind(self, at: Slots) -> Slots:
        """From each slot on the first that is free, or as far as a window goes."""
        is_taken = self._windows[at] != 0
        is_taken[:, -1] = False
        offsets: Slots = is_taken.argmin(axis=1)
        return at + offsets

    def _find_behind(self, marks: Words, at: Slots) -> Words:
        """The positions of keys from these slots on, as far as 32 bits tell."""
        there = self._windows[at]
        words = (there ^ marks[:, None]).ravel()
        hits = (words <= _POSITION).nonzero()[0]
        row = hits >> WINDOW_BITS
        found = np.zeros(len(marks), np.uint64)
        # Of two in a row, the first.
        found[row[::-1]] = words[hits[::-1]]
        if len(hits) >= len(marks) and found.all():
            return found
        # Where a window has no empty slot, the key may be behind it.
        further = (found == 0).nonzero()[0]
        further = further[there[further].all(axis=1)]
        if len(further):
            found[further] = self._find_behind(marks[further], at[further] + WINDOW)
        return found

    def _find_each(self, keys: Words, at: Slots) -> Slots:
        """The same slot by slot: for keys of which another has the same 32 bits, or an entry that
        is gone."""
        found: Slots = np.zeros(len(keys), np.intp)
        todo: Slots = np.arange(len(keys))
        while len(todo):
            words = self._slots[at]
            theirs = (words & _POSITION).view(np.int64)
            is_it = (words != 0) & (self._log[theirs] == keys)
            found[todo[is_it]] = theirs[is_it]
            rest = ((words != 0) & ~is_it).nonzero()[0]
            todo, keys, at = todo[rest], keys[rest], at[rest] + 1
        return found
