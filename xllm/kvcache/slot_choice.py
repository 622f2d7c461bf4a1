"""How well an idle slot suits a sequence: by what is mapped under it already. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

MAX_CANDIDATES = 4
_MAX_COMPARED = 4
"""Bounds of the search for a slot: a scheduler has no time for all slots and pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class SlotChoice:
    """An idle slot, and for the pages behind the given prefix what it has mapped there: wanted
    rather than others, as far as they are free."""

    slot: int
    wanted: list[int]


def score(
    mapped: Sequence[int], prefix: Sequence[int], num_pages: int, is_free: Callable[[int], bool]
) -> tuple[int, int]:
    """The larger the better for a sequence of `num_pages` that begins with the pages `prefix`:
    how many of these are in place, then how many free pages about lie where the others go."""
    num_alike = 0
    for have, want in zip(mapped, prefix, strict=False):
        if have != want:
            break
        num_alike += 1
    behind = mapped[len(prefix) : num_pages]
    # Of many pages some are looked at, all along: each stands for its neighbours.
    step = -(-len(behind) // _MAX_COMPARED) or 1
    return num_alike, step * sum([is_free(page) for page in behind[::step]])
