"""The KV memory of a device with virtual memory: blocks, always mapped once one behind the other.

Block b lies at pool_address + b * block_bytes: for copies, for clearing, and for attention by block
tables. What a sequence sees of the blocks under a slot is `slots`' business. The pool's addresses
stay the same while the memory is given back, so that what was captured with them holds.

Invariant: where attention may read, there are finite numbers, for a masked position is multiplied
by zero and zero times NaN is NaN; `may_hold_nan` says that a sequence has left others, and then
the tails of blocks are cleared before they are read. Fresh memory is zeroed, on the stream of the
thread that takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from xllm.errors import EngineError, InvariantError
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.memory.device_virtual import DeviceBlocks, DeviceVirtualMemory
from xllm.worker.memory.pool import KvPoolStatistics
from xllm.worker.platform.device_driver import DeviceDriver


class DeviceKvMemory:
    """All blocks of a layout as numbers of one type, addressed by block id or by token place
    (block * size + offset). Nothing may run that uses it while it is given back, taken again or
    closed."""

    def __init__(self, layout: DeviceLayout, dtype: torch.dtype, driver: DeviceDriver) -> None:
        """EngineError where the device has not as much, and then nothing of it is kept."""
        assert dtype.itemsize == layout.item_bytes
        self.layout = layout
        self.dtype = dtype
        self.may_hold_nan = False
        self._driver = driver
        self._num_copies = 0
        self._device = torch.device("cpu")
        self._blocks = torch.empty(0)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._physical = DeviceBlocks(driver, layout.num_blocks, layout.block_bytes)
        self._pool = DeviceVirtualMemory(self._physical)
        try:
            self.pool_address = self._pool.reserve(layout.total_bytes)
            self._map_pool()
        except EngineError as error:
            try:
                self.close()
            except EngineError as second:
                raise EngineError(f"{error.message}; then {second.message}") from error
            raise

    @property
    def held_bytes(self) -> int:
        """Memory of the device that it has now."""
        return self._physical.held_bytes

    def slot_memory(self) -> DeviceVirtualMemory:
        """Virtual memory over the same blocks, for slots; to be closed before this is."""
        return DeviceVirtualMemory(self._physical)

    def keys(self, layer: int) -> torch.Tensor:
        """[num_blocks, kv_heads, block_size, head_dim] of a layer; shares the memory."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[num_blocks, kv_heads, block_size, head_dim] of a layer; shares the memory."""
        return self._values[layer]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [rows, kv_heads, head_dim] at places `slots` [rows] (int64, distinct)."""
        blocks, offset = self._split(slots)
        self._keys[layer][blocks, :, offset] = k
        self._values[layer][blocks, :, offset] = v

    def gather(
        self, layer: int, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy blocks [count] (int64) token by token into keys and values, each [count,
        block_size * kv_heads * head_dim]."""
        layout = self.layout
        shape = (-1, layout.block_size, layout.num_kv_heads, layout.head_dim)
        keys.view(shape).copy_(self._keys[layer][block_ids].transpose(1, 2))
        values.view(shape).copy_(self._values[layer][block_ids].transpose(1, 2))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers, one after the other where a
        source is a destination too."""
        if not pairs:
            return
        self._num_copies += len(pairs)
        for source, destination in pairs:
            self._blocks[destination].copy_(self._blocks[source])

    def clear_slots(self, slots: Sequence[int]) -> None:
        """Zero these token places in all layers."""
        blocks, offset = self._split(torch.tensor(slots, dtype=torch.int64, device=self._device))
        for part in self._parts():
            part[blocks, :, offset] = 0

    def forget(self) -> None:
        """Nothing of what it holds matters any more: numbers that are not finite become zeros,
        the rest stays."""
        if not self.may_hold_nan:
            return
        for part in self._parts():
            part[_are_not_finite(part)] = 0
        self.may_hold_nan = False

    def give_back(self) -> None:
        """Give the memory back to the device, until `take_back`. Slots must be unmapped before."""
        self._clear_views()
        self._pool.unmap(self.pool_address, self.layout.total_bytes)
        self._physical.give_back()
        self.may_hold_nan = False

    def take_back(self) -> None:
        """Take memory again, zeroed, if it was given back. EngineError where there is not as much
        any more: then it stays given back, and this may be tried again."""
        if self._keys:
            return
        self._pool.unmap(self.pool_address, self.layout.total_bytes)
        self._physical.take()
        try:
            self._map_pool()
        except EngineError:
            self._physical.give_back()
            raise

    def close(self) -> None:
        """Give memory and addresses back. Closing again tries what was refused."""
        self._clear_views()
        self._pool.close()
        self._physical.give_back()

    def statistics(self) -> KvPoolStatistics:
        """Its size and what was copied."""
        return KvPoolStatistics(self.layout.num_blocks, self.layout.total_bytes, self._num_copies)

    def check(self) -> None:
        """Raise InvariantError where it holds numbers that are not finite, unnoticed."""
        if self.may_hold_nan:
            return
        for part in self._parts():
            bad = _are_not_finite(part).nonzero()
            if len(bad):
                raise InvariantError(
                    f"the KV memory of the device holds NaN or infinity unnoticed, from block "
                    f"{int(bad[0])} on"
                )

    def _map_pool(self) -> None:
        total = self.layout.total_bytes
        self._pool.map(self.pool_address, 0, total)
        flat = self._driver.tensor(self.pool_address, total).view(self.dtype)
        flat.zero_()
        self._device = flat.device
        self._blocks = flat.view(self.layout.num_blocks, -1)
        self._keys, self._values = _views(flat, self.layout)

    def _clear_views(self) -> None:
        """Nothing here may reach the memory any more."""
        self._blocks = torch.empty(0)
        self._keys, self._values = [], []

    def _parts(self) -> Iterator[torch.Tensor]:
        """Keys and values of each layer."""
        yield from self._keys
        yield from self._values

    def _split(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset in it of token places."""
        return places // self.layout.block_size, places % self.layout.block_size


def _are_not_finite(part: torch.Tensor) -> torch.Tensor:
    """[num_blocks] bool: which blocks of a layer's keys or values hold such numbers."""
    return ~part.isfinite().flatten(1).all(1)


def _views(
    flat: torch.Tensor, layout: DeviceLayout
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Views of the keys and of the values of each layer."""
    shape = (layout.num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    strides = (layout.block_numbers, layout.head_numbers, layout.head_dim, 1)
    starts = range(0, layout.layer_numbers * layout.num_layers, layout.layer_numbers)
    return (
        [flat.as_strided(shape, strides, start) for start in starts],
        [flat.as_strided(shape, strides, start + layout.value_numbers) for start in starts],
    )
