"""Bucket sizes: a graph is captured for a bucket and replayed for every shape that fits it.

Numbers only. A shape is padded to its bucket, so buckets are close together where padding costs
most of a step's time (few rows, where a step reads the weights whatever it computes, pay nothing)
and few where each costs a capture.
"""

from __future__ import annotations

import bisect
import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """Sizes in rising order."""

    sizes: tuple[int, ...]

    def of(self, size: int) -> int:
        """The smallest bucket that holds `size`; 0: none does."""
        at = bisect.bisect_left(self.sizes, size)
        return self.sizes[at] if size > 0 and at < len(self.sizes) else 0


def batch_buckets(most: int) -> Buckets:
    """Of sequences in a decode step: 1, 2, 4, 8, then in steps of 8 to 64, of 16 to 256, of 64
    beyond; the last one is `most`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return _up_to(sizes, most)


def row_buckets(most: int) -> Buckets:
    """Of rows of a step with prompts: each is at most an eighth above the one before it, from 16
    on, so that padding adds as little to products that fill the device."""
    sizes = [1, 2, 4, 8]
    size = 16
    while size < most:
        sizes.append(size)
        size += max(8, size // 8 // 8 * 8)
    return _up_to(sizes, most)


def _up_to(sizes: list[int], most: int) -> Buckets:
    if most < 1:
        return Buckets(())
    return Buckets((*(size for size in sizes if size < most), most))
