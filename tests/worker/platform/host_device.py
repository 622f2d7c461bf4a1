"""A device whose memory is the host's: physical memory is memfds, its addresses are real.

It keeps the rules of the real drivers and refuses what they refuse: an address where something is
mapped is mapped again only after it was unmapped; a mapping is unmapped as a whole; nothing can be
touched before access was given (PROT_NONE); a handle may be released while something maps it, and
its memory goes with the last mapping. New memory is all ones, which is NaN. A call can be made to
fail. `FakeDriver` is a DeviceDriver over it; the stand-ins for the real modules are beside it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import threading

import torch

from xllm.errors import EngineError

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
OUT_OF_MEMORY = "OUT_OF_MEMORY"
INVALID = "INVALID_VALUE"


class RefusedError(Exception):
    """What a real driver would give a status for; the argument is its word."""


@dataclasses.dataclass
class _Physical:
    fd: int
    num_bytes: int
    num_maps: int = 0
    is_released: bool = False


@dataclasses.dataclass
class _Mapping:
    num_bytes: int
    handle: int
    has_access: bool = False


class HostDevice:
    """`total_bytes` of memory and `address_bytes` of addresses."""

    def __init__(
        self,
        *,
        granularity: int = mmap.PAGESIZE,
        total_bytes: int = 1 << 30,
        address_bytes: int = 1 << 41,
    ) -> None:
        self.granularity = granularity
        self.total_bytes = total_bytes
        self.address_bytes = address_bytes
        self.calls: list[str] = []
        self.fails_in = 0
        """The call that fails, counted from the next one on; 0: none."""
        self.fails_on = ""
        """Every call of this name fails."""
        self._lock = threading.RLock()
        self._ranges: dict[int, int] = {}
        self._physical: dict[int, _Physical] = {}
        self._mappings: dict[int, _Mapping] = {}
        self._next_handle = 1000
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_ssize_t,
        )  # fmt: skip
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    @property
    def used_bytes(self) -> int:
        """Physical memory that is taken."""
        return sum(one.num_bytes for one in self._physical.values())

    def left(self) -> tuple[int, int, int]:
        """Ranges, physical memories and mappings that there are: what was leaked, at an end."""
        return len(self._ranges), len(self._physical), len(self._mappings)

    def reserve(self, num_bytes: int) -> int:
        with self._called("reserve"):
            self._aligned(num_bytes)
            if sum(self._ranges.values()) + num_bytes > self.address_bytes:
                raise RefusedError(OUT_OF_MEMORY)
            # Larger, to begin at a multiple of the granularity.
            found = self._mmap(0, num_bytes + self.granularity, _PROT_NONE, self._none, -1)
            address = -(-found // self.granularity) * self.granularity
            self._libc.munmap(found, address - found)
            self._libc.munmap(address + num_bytes, found + self.granularity - address)
            self._ranges[address] = num_bytes
            return address

    def free_range(self, address: int, num_bytes: int | None) -> None:
        with self._called("free_range"):
            size = self._ranges.get(address)
            if size is None or num_bytes not in (None, size):
                raise RefusedError(INVALID)
            if any(address <= place < address + size for place in self._mappings):
                raise RefusedError(INVALID)
            self._libc.munmap(address, size)
            del self._ranges[address]

    def create(self, num_bytes: int) -> int:
        with self._called("create"):
            self._aligned(num_bytes)
            if self.used_bytes + num_bytes > self.total_bytes:
                raise RefusedError(OUT_OF_MEMORY)
            fd = os.memfd_create("physical", os.MFD_CLOEXEC)
            os.write(fd, b"\xff" * num_bytes)
            self._next_handle += 1
            self._physical[self._next_handle] = _Physical(fd, num_bytes)
            return self._next_handle

    def release(self, handle: int) -> None:
        with self._called("release"):
            self._live(handle).is_released = True
            self._drop(handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        with self._called("map"):
            physical = self._live(handle)
            self._aligned(num_bytes, address)
            inside = any(
                start <= address and address + num_bytes <= start + size
                for start, size in self._ranges.items()
            )
            overlaps = any(
                place < address + num_bytes and address < place + one.num_bytes
                for place, one in self._mappings.items()
            )
            if num_bytes != physical.num_bytes or not inside or overlaps:
                raise RefusedError(INVALID)
            self._mmap(address, num_bytes, _PROT_NONE, mmap.MAP_SHARED | _MAP_FIXED, physical.fd)
            self._mappings[address] = _Mapping(num_bytes, handle)
            physical.num_maps += 1

    def unmap(self, address: int, num_bytes: int | None) -> None:
        """`num_bytes` None: the one mapping that begins there."""
        with self._called("unmap"):
            if num_bytes is None:
                num_bytes = self._mappings[address].num_bytes if address in self._mappings else 0
            places = self._tiles(address, num_bytes)
            self._mmap(address, num_bytes, _PROT_NONE, self._none | _MAP_FIXED, -1)
            for place in places:
                handle = self._mappings.pop(place).handle
                self._physical[handle].num_maps -= 1
                self._drop(handle)

    def set_access(self, address: int, num_bytes: int) -> None:
        with self._called("set_access"):
            for place in self._tiles(address, num_bytes):
                self._mappings[place].has_access = True
            access = mmap.PROT_READ | mmap.PROT_WRITE
            assert self._libc.mprotect(address, num_bytes, access) == 0

    def can_touch(self, address: int, num_bytes: int) -> bool:
        """Whether the host can read there; asked of the kernel, so that it is no fault."""
        reader, writer = os.pipe()
        try:
            return ctypes.CDLL(None).write(writer, ctypes.c_void_p(address), num_bytes) == num_bytes
        finally:
            os.close(reader)
            os.close(writer)

    def peek(self, handle: int, offset: int, count: int) -> bytes:
        """Bytes of a physical memory."""
        return os.pread(self._physical[handle].fd, count, offset)

    def poke(self, handle: int, offset: int, data: bytes) -> None:
        """Write to a physical memory."""
        os.pwrite(self._physical[handle].fd, data, offset)

    _none = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

    def _called(self, name: str) -> threading.RLock:
        with self._lock:
            self.calls.append(name)
            if self.fails_in:
                self.fails_in -= 1
                if not self.fails_in:
                    raise RefusedError("UNKNOWN")
            if self.fails_on == name:
                raise RefusedError("UNKNOWN")
        return self._lock

    def _aligned(self, *numbers: int) -> None:
        if any(number <= 0 or number % self.granularity for number in numbers):
            raise RefusedError(INVALID)

    def _live(self, handle: int) -> _Physical:
        found = self._physical.get(handle)
        if found is None or found.is_released:
            raise RefusedError(INVALID)
        return found

    def _drop(self, handle: int) -> None:
        one = self._physical[handle]
        if one.is_released and not one.num_maps:
            os.close(one.fd)
            del self._physical[handle]

    def _tiles(self, address: int, num_bytes: int) -> list[int]:
        """The mappings that make up a part of the addresses, without a gap and whole."""
        places, at = [], address
        while at < address + num_bytes:
            if at not in self._mappings:
                raise RefusedError(INVALID)
            places.append(at)
            at += self._mappings[at].num_bytes
        if not places or at != address + num_bytes:
            raise RefusedError(INVALID)
        return places

    def _mmap(self, address: int, num_bytes: int, access: int, flags: int, fd: int) -> int:
        found = self._libc.mmap(address or None, num_bytes, access, flags, fd, 0)
        assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return found


class FakeDriver:
    """DeviceDriver over a host's device. `unmaps_runs`: see DeviceDriver."""

    def __init__(self, device: HostDevice | None = None, *, unmaps_runs: bool = True) -> None:
        self.device = device or HostDevice()
        self.unmaps_runs = unmaps_runs
        self.granularity = self.device.granularity

    def reserve(self, num_bytes: int) -> int:
        return self._call("reserve", num_bytes)

    def free_range(self, address: int, num_bytes: int) -> None:
        self._call("free_range", address, num_bytes)

    def create(self, num_bytes: int) -> int:
        return self._call("create", num_bytes)

    def release(self, handle: int) -> None:
        self._call("release", handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        self._call("map", address, num_bytes, handle)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("unmap", address, num_bytes if self.unmaps_runs else None)

    def set_access(self, address: int, num_bytes: int) -> None:
        self._call("set_access", address, num_bytes)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        data = (ctypes.c_ubyte * num_bytes).from_address(address)
        return torch.frombuffer(data, dtype=torch.uint8)

    def _call(self, name: str, *args: int | None) -> int:
        try:
            return getattr(self.device, name)(*args)
        except RefusedError as error:
            raise EngineError(f"{name}: {error}") from error
