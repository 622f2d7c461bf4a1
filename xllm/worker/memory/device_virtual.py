"""Virtual memory of a device, whatever its driver: blocks of physical memory, ranges over them.

A handle of the driver is a block, and the unit of mapping. A block may be mapped in as many places
as one likes. What is not mapped **faults**: unlike a CPU's, such memory does not read as zeros, so
a kernel touches no page behind the length that it was given.

The driver's calls are not ordered with the device's streams. `PageMapper` guarantees that no step
runs over a mapping that changes. Invariant: `_mapped` says what the driver has mapped, also after
a call failed; what failed half is taken away again, for no access may have been given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from xllm.errors import EngineError, InvariantError
from xllm.worker.platform.device_driver import DeviceDriver


class DeviceBlocks:
    """`num_blocks` blocks of physical memory of `block_bytes` each, or none while it is given
    back."""

    def __init__(self, driver: DeviceDriver, num_blocks: int, block_bytes: int) -> None:
        """Takes the memory: EngineError where there is not enough, and then none is taken."""
        assert block_bytes % driver.granularity == 0
        self.driver = driver
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._handles: list[int] = []
        self.take()

    def __del__(self) -> None:
        # A handle that is forgotten would keep its memory for the life of the process.
        if getattr(self, "_handles", None):
            self.give_back()

    @property
    def held_bytes(self) -> int:
        """Memory that is taken."""
        return len(self._handles) * self.block_bytes

    def handle(self, block: int) -> int:
        """Of a block. InvariantError where it is not there."""
        if len(self._handles) != self.num_blocks or not 0 <= block < self.num_blocks:
            raise InvariantError(f"block {block} of {self.num_blocks}, {self.held_bytes} bytes")
        return self._handles[block]

    def take(self) -> None:
        """Take the memory, again. EngineError where there is not enough, and then none is
        taken."""
        self.give_back()  # of what an earlier call could not give back
        try:
            while len(self._handles) < self.num_blocks:
                self._handles.append(self.driver.create(self.block_bytes))
        except EngineError:
            _tried([], self.give_back)
            raise

    def give_back(self) -> None:
        """Give it back to the device; what maps a block still keeps it. EngineError at the end
        where some could not be, which a later call tries again."""
        handles, self._handles = self._handles, []
        refused: list[EngineError] = []
        for handle in handles:
            if not _tried(refused, self.driver.release, handle):
                self._handles.append(handle)
        if refused:
            raise refused[0]


class DeviceVirtualMemory:
    """VirtualMemory over blocks; offsets count them one behind the other. The blocks stay their
    owner's."""

    def __init__(self, blocks: DeviceBlocks) -> None:
        self._blocks = blocks
        self._driver = blocks.driver
        self._ranges: dict[int, int] = {}
        # Addresses of blocks. Threads that work on different slots change different elements.
        self._mapped: set[int] = set()

    def __del__(self) -> None:
        self.close()

    @property
    def granularity(self) -> int:
        """A block."""
        return self._blocks.block_bytes

    def reserve(self, num_bytes: int) -> int:
        """See VirtualMemory. Costs addresses and no memory."""
        address = self._driver.reserve(num_bytes)
        self._ranges[address] = num_bytes
        return address

    def map(self, address: int, offset: int, num_bytes: int) -> None:
        """See VirtualMemory. Where it fails, nothing is mapped there, not even what was."""
        self._check(address, num_bytes)
        size = self.granularity
        if offset < 0 or offset % size or offset + num_bytes > self._blocks.num_blocks * size:
            raise InvariantError(
                f"bytes from {offset} of {self._blocks.num_blocks} blocks of {size}"
            )
        first = offset // size
        handles = [self._blocks.handle(first + i) for i in range(num_bytes // size)]
        self._take_away(address, num_bytes)
        try:
            for index, handle in enumerate(handles):
                place = address + index * size
                self._driver.map(place, size, handle)
                self._mapped.add(place)
            self._driver.set_access(address, num_bytes)
        except EngineError:
            # What this cannot take away, either, stays in the books and goes before the next map.
            _tried([], self._take_away, address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """See VirtualMemory. Where it fails, some may be there still: nothing counts on it."""
        self._check(address, num_bytes)
        self._take_away(address, num_bytes)

    def close(self) -> None:
        """See VirtualMemory. Closing again does nothing, but to what was refused: EngineError, at
        the end, where something was."""
        refused: list[EngineError] = []
        for start, count in _runs(sorted(self._mapped), self.granularity):
            _tried(refused, self._take_run, start, count)
        for address, num_bytes in list(self._ranges.items()):
            still = any(address <= place < address + num_bytes for place in self._mapped)
            if not still and _tried(refused, self._driver.free_range, address, num_bytes):
                del self._ranges[address]
        if refused:
            raise refused[0]

    def _take_away(self, address: int, num_bytes: int) -> None:
        places = range(address, address + num_bytes, self.granularity)
        mapped = [place for place in places if place in self._mapped]
        for start, count in _runs(mapped, self.granularity):
            self._take_run(start, count)

    def _take_run(self, start: int, count: int) -> None:
        size = self.granularity
        step = count if self._driver.unmaps_runs else 1
        for first in range(start, start + count * size, step * size):
            self._driver.unmap(first, step * size)
            self._mapped.difference_update(range(first, first + step * size, size))

    def _check(self, address: int, num_bytes: int) -> None:
        for start, size in self._ranges.items():
            if start <= address and address + num_bytes <= start + size and num_bytes > 0:
                if (address - start) % self.granularity or num_bytes % self.granularity:
                    raise InvariantError(f"{num_bytes} bytes at {address:#x} are no whole blocks")
                return
        raise InvariantError(f"{num_bytes} bytes at {address:#x} are in no range that is reserved")


def _tried(refused: list[EngineError], call: Callable[..., None], *args: int) -> bool:
    """Whether a call was taken; where it was not, what it raised is added."""
    try:
        call(*args)
    except EngineError as error:
        refused.append(error)
        return False
    return True


def _runs(places: Iterable[int], size: int) -> Iterator[tuple[int, int]]:
    """(first, length) of the runs of ascending places that lie `size` apart."""
    first, count = 0, 0
    for place in places:
        if count and place == first + count * size:
            count += 1
            continue
        if count:
            yield first, count
        first, count = place, 1
    if count:
        yield first, count
