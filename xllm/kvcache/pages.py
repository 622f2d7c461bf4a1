"""The physical pages of a device's KV memory: which are free, and whose the others are.

A page is one block of all layers. Free pages are handed out so that a sequence's pages lie
together: mapping them is then one operation, and one mapping of the few that a process may have.
Knows no holders, contents or slots. Invariant: a page is free if and only if it has no owner.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum

from xllm.errors import InvariantError

NO_OWNER = -1
_GROUP_PAGES = 16


class PageState(IntEnum):
    """FREE: empty, mapped nowhere. ALLOCATED: somebody's, mapped under no slot. MAPPED: under
    the slot of a sequence that uses it. REUSABLE: mapped, but under slots that nobody uses or
    behind what their sequence uses; cached or empty."""

    FREE = 0
    ALLOCATED = 1
    MAPPED = 2
    REUSABLE = 3


@dataclasses.dataclass(frozen=True, slots=True)
class PagePoolStatistics:
    """Pages that are free, and free groups of pages that lie together."""

    num_pages: int
    num_free: int
    num_whole_groups: int


class PagePool:
    """Pages 0 to num_pages - 1. Owners are small numbers that the caller chooses, 0 and up."""

    __slots__ = ("_group_free", "_num_free", "_owner", "_partial", "_whole", "num_pages")

    def __init__(self, num_pages: int) -> None:
        """`num_pages` >= 1; all are free."""
        assert num_pages >= 1
        self.num_pages = num_pages
        self._num_free = num_pages
        self._owner = [NO_OWNER] * num_pages
        # Pages that lie together form groups. A new run begins in a group that is free as a
        # whole, so that it can grow there. Both are sets whose last member goes first.
        num_groups = -(-num_pages // _GROUP_PAGES)
        self._group_free = [self._size(group) for group in range(num_groups)]
        self._whole = dict.fromkeys(range(num_groups - 1, -1, -1))
        self._partial: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return self._num_free

    def owner(self, page: int) -> int:
        """Whose a page is; NO_OWNER: it is free."""
        return self._owner[page]

    def take(self, owner: int, wanted: int = -1, after: int = -1) -> int:
        """A free page, now the owner's: `wanted` if it is free, else the one behind `after`, else
        one with free pages behind it. Mutates. There must be one (see `num_free`)."""
        owners = self._owner
        page = wanted
        if page < 0 or owners[page] != NO_OWNER:
            page = after + 1
            if after < 0 or page == self.num_pages or owners[page] != NO_OWNER:
                page = self._begin_run()
        owners[page] = owner
        self._num_free -= 1
        group = page // _GROUP_PAGES
        self._group_free[group] -= 1
        self._whole.pop(group, None)
        if self._group_free[group]:
            self._partial[group] = None
        else:
            self._partial.pop(group, None)
        return page

    def put(self, page: int) -> None:
        """A page is nobody's any more. Mutates."""
        if self._owner[page] == NO_OWNER:
            raise InvariantError(f"page {page} was given back twice")
        self._owner[page] = NO_OWNER
        self._num_free += 1
        group = page // _GROUP_PAGES
        self._group_free[group] += 1
        if self._group_free[group] == self._size(group):
            self._partial.pop(group, None)
            self._whole[group] = None
        else:
            self._partial[group] = None

    def statistics(self) -> PagePoolStatistics:
        """A snapshot; does not mutate."""
        return PagePoolStatistics(self.num_pages, self._num_free, len(self._whole))

    def check(self) -> None:
        """Raise InvariantError where the counts contradict the owners."""
        free = [0] * len(self._group_free)
        for page, owner in enumerate(self._owner):
            free[page // _GROUP_PAGES] += owner == NO_OWNER
        if free != self._group_free or sum(free) != self._num_free:
            raise InvariantError(f"{self._num_free} pages free in {self._group_free}, not {free}")
        for group, count in enumerate(free):
            is_whole = count == self._size(group)
            if (group in self._whole) != is_whole:
                raise InvariantError(f"group {group} with {count} free pages is listed wrongly")
            if (group in self._partial) != (count > 0 and not is_whole):
                raise InvariantError(f"group {group} with {count} free pages is listed wrongly")

    def _size(self, group: int) -> int:
        return min(_GROUP_PAGES, self.num_pages - group * _GROUP_PAGES)

    def _begin_run(self) -> int:
        """A free page that continues nothing: the first of a whole group, if there is one."""
        groups = self._whole or self._partial
        group, _ = groups.popitem()
        groups[group] = None
        page = group * _GROUP_PAGES
        while self._owner[page] != NO_OWNER:
            page += 1
        return page
