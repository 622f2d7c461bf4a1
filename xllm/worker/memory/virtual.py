"""Virtual memory apart from physical: the interface, and the CPU's implementation of it.

A device reserves ranges of addresses and maps parts of one physical memory under them. On a CPU
the physical memory is a memfd, and a range without pages reads as zeros (the kernel's zero page)
and cannot be written; elsewhere (`device_virtual`) to touch one is a fault. Decides nothing and
keeps no books of what is mapped where.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Protocol

from xllm.errors import EngineError, InvariantError

_MAPS = Path("/proc/self/maps")
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")
_SPARE_MAPPINGS = 5530
"""Mappings left for libraries, threads and buffers that come later."""

# Of <sys/mman.h>; the module `mmap` does not name them.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


class VirtualMemory(Protocol):
    """Ranges of addresses over one physical memory. Addresses, offsets and lengths are bytes and
    multiples of `granularity`. One thread at a time works on a range; different ranges may be
    worked on at once. EngineError where the device refuses."""

    @property
    def granularity(self) -> int:
        """The smallest unit of mapping."""

    def reserve(self, num_bytes: int) -> int:
        """The address of a new range without pages."""

    def map(self, address: int, offset: int, num_bytes: int) -> None:
        """Map the physical bytes from `offset` on at `address`, in place of what is there."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take away what is mapped there, if anything; the addresses stay reserved."""

    def close(self) -> None:
        """Give all ranges up. Nothing may use their addresses any more."""


class CpuVirtualMemory:
    """VirtualMemory over a descriptor (which stays its owner's)."""

    def __init__(self, fd: int) -> None:
        self._ranges: dict[int, int] = {}
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_ssize_t,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def __del__(self) -> None:
        # A range that is forgotten would keep its pages for the life of the process.
        self.close()

    @property
    def granularity(self) -> int:
        """A page of the machine."""
        return mmap.PAGESIZE

    def reserve(self, num_bytes: int) -> int:
        """See VirtualMemory. Costs addresses and no memory."""
        address = self._mmap(0, num_bytes, mmap.PROT_READ, self._empty_flags(), -1, 0)
        self._ranges[address] = num_bytes
        return address

    def map(self, address: int, offset: int, num_bytes: int) -> None:
        """See VirtualMemory. The pages are made real at once, so that no step waits for them."""
        self._check(address, num_bytes)
        if offset < 0 or offset + num_bytes > self._size:
            raise InvariantError(f"bytes from {offset} of a memory of {self._size}")
        flags = mmap.MAP_SHARED | _MAP_FIXED | mmap.MAP_POPULATE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._mmap(address, num_bytes, access, flags, self._fd, offset)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See VirtualMemory."""
        self._check(address, num_bytes)
        flags = self._empty_flags() | _MAP_FIXED
        self._mmap(address, num_bytes, mmap.PROT_READ, flags, -1, 0)

    def close(self) -> None:
        """See VirtualMemory. Closing again does nothing."""
        for address, num_bytes in self._ranges.items():
            self._libc.munmap(address, num_bytes)
        self._ranges.clear()

    def _empty_flags(self) -> int:
        return mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

    def _mmap(
        self, address: int, num_bytes: int, access: int, flags: int, fd: int, offset: int
    ) -> int:
        found = self._libc.mmap(address or None, num_bytes, access, flags, fd, offset)
        if found is None or found == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise EngineError(f"mmap of {num_bytes} bytes failed: {reason}")
        return int(found)

    def _check(self, address: int, num_bytes: int) -> None:
        """With MAP_FIXED a wrong address replaces somebody else's memory."""
        for start, size in self._ranges.items():
            if start <= address and address + num_bytes <= start + size and num_bytes > 0:
                return
        raise InvariantError(f"{num_bytes} bytes at {address:#x} are in no range that is reserved")


def available_mappings() -> int:
    """How many more mappings this process may make, less a margin; 0 or more."""
    allowed = int(_MAX_MAPS.read_text())
    used = _MAPS.read_bytes().count(b"\n")
    return max(allowed - used - _SPARE_MAPPINGS, 0)
