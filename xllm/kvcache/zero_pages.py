"""Arrays of zeros that take memory where they are written to, and give it back in part."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

_NORESERVE = 0x4000
"""MAP_NORESERVE of Linux: room that is never used must not count against the machine's memory."""
_CHUNK = 256 << 10
"""Memory is given back in pieces of this size."""


class ZeroPages:
    """`array`: (count,) of `dtype`, zeros."""

    def __init__(self, count: int, dtype: npt.DTypeLike) -> None:
        size = max(1, count * np.dtype(dtype).itemsize)
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self.array: npt.NDArray[np.generic] = np.frombuffer(self._map, dtype, count)

    def clear(self, start: int, stop: int, origin: int) -> None:
        """Zeros from `start` to `stop`. From `origin` on all before are zeros already, and their
        memory goes back, too, in whole pieces."""
        self.array[start:stop] = 0
        width = self.array.itemsize
        low = -(-origin * width // _CHUNK) * _CHUNK
        first = max(low, start * width // _CHUNK * _CHUNK)
        last = stop * width // _CHUNK * _CHUNK
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
