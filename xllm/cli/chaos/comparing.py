"""What is wrong with a stream: compared item by item with the one that it should have been. Pure.

A received stream is aligned with the expected one on their longest common blocks. What is left
over on both sides with the same value came in another place: reordered. Of the rest, an expected
item that never came is lost; a received one that had come before is duplicated, any other one
foreign.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Self

_HALF_A_CHARACTER = "\ufffd"
Item = int | str
"""A token id, or one character of a text."""


@dataclasses.dataclass(frozen=True)
class Differences:
    """Counts of wrong items; all 0: the streams are equal."""

    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    foreign: int = 0

    def __add__(self, other: Self) -> Differences:
        return Differences(
            self.lost + other.lost,
            self.duplicated + other.duplicated,
            self.reordered + other.reordered,
            self.foreign + other.foreign,
        )

    def __bool__(self) -> bool:
        return bool(self.lost or self.duplicated or self.reordered or self.foreign)


EQUAL = Differences()


def compare(expected: Sequence[Item], got: Sequence[Item], *, ended: bool = True) -> Differences:
    """`ended`: the stream says that it is complete; else it may stop anywhere (a text: within a
    character), but what came must be the beginning of `expected`."""
    if not ended:
        if got and got[-1] == _HALF_A_CHARACTER:
            got = got[:-1]
        expected = expected[: len(got)]
    if list(expected) == list(got):
        return EQUAL
    missing: Counter[Item] = Counter()
    extra: list[Item] = []
    matcher = SequenceMatcher(None, expected, got, autojunk=False)
    for kind, first, last, got_first, got_last in matcher.get_opcodes():
        if kind != "equal":
            missing.update(expected[first:last])
            extra += got[got_first:got_last]
    reordered = duplicated = foreign = 0
    known = set(expected)
    for item in extra:
        if missing[item] > 0:
            missing[item] -= 1
            reordered += 1
        elif item in known:
            duplicated += 1
        else:
            foreign += 1
    return Differences(missing.total(), duplicated, reordered, foreign)
