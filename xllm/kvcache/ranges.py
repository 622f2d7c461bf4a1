"""Which byte ranges of an arena are free: first fit, neighbours joined. Pure.

Invariant: the free ranges are ordered, do not touch each other, and lie inside the arena.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from xllm.errors import InvariantError

ALIGNMENT = 64
"""Offsets and sizes are multiples of this, so that views of any element type are aligned."""


def aligned(num_bytes: int) -> int:
    """The size that a range of so many bytes takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class FreeRanges:
    """The free ranges of `size_bytes` bytes."""

    __slots__ = ("_ranges", "free_bytes", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes // ALIGNMENT * ALIGNMENT
        self.free_bytes = self.size_bytes
        self._ranges: list[tuple[int, int]] = [(0, self.size_bytes)]

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a range of `num_bytes` (aligned up), or None where none is long enough."""
        size = aligned(num_bytes)
        for index, (offset, length) in enumerate(self._ranges):
            if length >= size:
                if length == size:
                    del self._ranges[index]
                else:
                    self._ranges[index] = (offset + size, length - size)
                self.free_bytes -= size
                return offset
        return None

    def free(self, offset: int, num_bytes: int) -> None:
        """Give back a range as it was allocated."""
        size = aligned(num_bytes)
        ranges = self._ranges
        index = bisect_left(ranges, (offset, 0))
        follows = index < len(ranges) and ranges[index][0] <= offset + size
        precedes = index > 0 and sum(ranges[index - 1]) >= offset
        if (follows and ranges[index][0] < offset + size) or (
            precedes and sum(ranges[index - 1]) > offset
        ):
            raise InvariantError(f"bytes {offset} to {offset + size} are freed twice")
        self.free_bytes += size
        if follows:
            size += ranges.pop(index)[1]
        if precedes:
            offset, length = ranges.pop(index - 1)
            size += length
        insort(ranges, (offset, size))

    def check(self) -> None:
        """Raise InvariantError if the ranges overlap, touch or do not add up."""
        end = -1
        for offset, length in self._ranges:
            if offset <= end or length <= 0 or offset + length > self.size_bytes:
                raise InvariantError(f"free ranges {self._ranges} of {self.size_bytes} bytes")
            end = offset + length
        if sum(length for _, length in self._ranges) != self.free_bytes:
            raise InvariantError(f"{self._ranges} are not {self.free_bytes} free bytes")
