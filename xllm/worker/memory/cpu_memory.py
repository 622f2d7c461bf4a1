"""The KV memory of a CPU: one memfd of blocks, always mapped once as a whole.

It holds bytes and copies blocks; which block belongs to whom is the master's. What a sequence
sees of it under a slot is `slots`' business. The descriptor may be given, so that another
process's arena can be the memory. Blocks that nobody has touched cost no memory, and no method
here makes them real by looking at them. Invariant: where attention may read, there are finite
numbers, for a masked position is multiplied by zero and zero times NaN is NaN; `may_hold_nan`
says that a sequence has left others, and then the tails of blocks are cleared before they are
read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence

import torch

from xllm.errors import InvariantError
from xllm.worker.memory.block_layout import RUN_TOKENS, BlockLayout
from xllm.worker.memory.pool import KvPoolStatistics
from xllm.worker.memory.rounded import round_heads, scale_views


class CpuKvMemory:
    """All blocks of a layout as numbers of one type, addressed by block id or by token place
    (block * size + offset). Zeroed where nothing was written. Where the layout has
    scales they are int8 multiples of a scale for each token and head."""

    def __init__(
        self,
        layout: BlockLayout,
        dtype: torch.dtype,
        *,
        fd: int = -1,
        origin: str = "private",
        is_shared: bool = False,
    ) -> None:
        """`fd`: a descriptor of at least the layout's size, which is duplicated; -1: a memfd of
        its own. `is_shared`: other models write to its blocks what may be any number here. OSError
        where it cannot be mapped, InvariantError where it is too small."""
        assert dtype.itemsize == layout.item_bytes
        self.layout = layout
        self.dtype = dtype
        self.is_shared = is_shared
        self.may_hold_nan = is_shared
        self._origin = origin
        self._num_copies = 0
        self.fd = open_memory(layout.total_bytes) if fd < 0 else _duplicate(fd, layout.total_bytes)
        try:
            self._map = mmap.mmap(self.fd, layout.total_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self._flat = torch.frombuffer(self._map, dtype=dtype)
        self._blocks = self._flat.view(layout.num_blocks, -1)
        self._keys, self._values = _views(self._flat, layout)
        self._scales = scale_views(self._flat, layout) if layout.scale_bytes else None

    def __del__(self) -> None:
        # The mapping goes with the last tensor over it.
        if hasattr(self, "_map"):
            os.close(self.fd)

    @property
    def pool_address(self) -> int:
        """Where block 0 begins; block b begins b * block_bytes behind."""
        return self._flat.data_ptr()

    def pool_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it, flat, as numbers of a type. Shares the memory."""
        return self._flat.view(dtype)

    def keys(self, layer: int) -> torch.Tensor:
        """[num_blocks, kv_heads, block_size / 16, head_dim, 16] of a layer; shares the memory."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[num_blocks, kv_heads, block_size, head_dim] of a layer; shares the memory."""
        return self._values[layer]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [rows, kv_heads, head_dim] at places `slots` [rows] (int64, distinct)."""
        blocks, run, lane, offset = self._split(slots)
        if self._scales is not None:
            (k, k_scales), (v, v_scales) = round_heads(k), round_heads(v)
            self._scales[layer][blocks, 0, :, offset] = k_scales
            self._scales[layer][blocks, 1, :, offset] = v_scales
        self._keys[layer][blocks, :, run, :, lane] = k
        self._values[layer][blocks, :, offset] = v

    def gather(
        self, layer: int, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy blocks [count] (int64) token by token into keys and values, each [count,
        block_size * kv_heads * head_dim]."""
        layout = self.layout
        shape = (-1, layout.block_size, layout.num_kv_heads, layout.head_dim)
        runs = (-1, layout.block_size // RUN_TOKENS, RUN_TOKENS, *shape[2:])
        keys.view(runs).copy_(self._keys[layer][block_ids].permute(0, 2, 4, 1, 3))
        values.view(shape).copy_(self._values[layer][block_ids].transpose(1, 2))
        if self._scales is not None:
            scales = self._scales[layer][block_ids].transpose(2, 3)[..., None]
            keys.view(shape).mul_(scales[:, 0])
            values.view(shape).mul_(scales[:, 1])

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers, one after the other where a
        source is a destination too."""
        if not pairs:
            return
        self._num_copies += len(pairs)
        for source, destination in pairs:
            self._blocks[destination] = self._blocks[source]

    def clear_slots(self, slots: Sequence[int]) -> None:
        """Zero these token places in all layers."""
        blocks, run, lane, offset = self._split(torch.tensor(slots, dtype=torch.int64))
        for keys, values in zip(self._keys, self._values, strict=True):
            keys[blocks, :, run, :, lane] = 0
            values[blocks, :, offset] = 0
        for scales in self._scales or ():
            scales[blocks, :, :, offset] = 0

    def forget(self) -> None:
        """Nothing of what it holds matters any more: numbers that are not finite become zeros,
        the rest stays."""
        if not self.may_hold_nan or self.is_shared:
            return
        for part in self._touched():
            part[~part.isfinite()] = 0
        self.may_hold_nan = False

    def give_back(self) -> None:
        """Give all memory back to the machine; the blocks are there and zero. For a sleep. What is
        shared is its owner's to give back."""
        if self.is_shared:
            return
        self._map.madvise(mmap.MADV_REMOVE)
        self.may_hold_nan = False

    def take_back(self) -> None:
        """Blocks become real by use."""

    def close(self) -> None:
        """The descriptor goes with this object, the mapping with the last tensor over it."""

    def resident_bytes(self) -> int:
        """Memory that the blocks take now, all mappings together."""
        return os.fstat(self.fd).st_blocks * 512

    def statistics(self) -> KvPoolStatistics:
        """Its size and what was copied."""
        return KvPoolStatistics(self.layout.num_blocks, self.layout.total_bytes, self._num_copies)

    def check(self) -> None:
        """Raise InvariantError where it holds numbers that are not finite, unnoticed."""
        if self.may_hold_nan:
            return
        for part in self._touched():
            if not bool(part.isfinite().all()):
                place = (part.data_ptr() - self.pool_address) // self.layout.block_bytes
                raise InvariantError(
                    f"the KV memory ({self._origin}) holds NaN or infinity unnoticed, from block "
                    f"{place} on"
                )

    def _split(
        self, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block, run, place in the run and offset in the block of token places."""
        size = self.layout.block_size
        offset = places % size
        return places // size, offset // RUN_TOKENS, offset % RUN_TOKENS, offset

    def _touched(self) -> Iterator[torch.Tensor]:
        """What may be no finite number in the parts of the memory that are real: all of it, flat,
        or of rounded numbers their scales. A look at the others would make them so: a read of a
        hole in a memfd fills it."""
        end, size, block = 0, self.layout.item_bytes, self.layout.block_bytes
        while True:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            if start >= self.layout.total_bytes:
                return
            end = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.layout.total_bytes)
            if self._scales is None:
                yield self._flat[start // size : end // size]
            for scales in self._scales or ():
                yield scales[start // block : -(-end // block)]


def open_memory(num_bytes: int) -> int:
    """The descriptor of a memfd of so many bytes. OSError where there cannot be one."""
    fd = os.memfd_create("xllm-kv-pool", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _duplicate(fd: int, num_bytes: int) -> int:
    found = os.fstat(fd).st_size
    if found < num_bytes:
        raise InvariantError(f"the pool needs {num_bytes} bytes, its memory has {found}")
    return os.dup(fd)


def _views(flat: torch.Tensor, layout: BlockLayout) -> tuple[list[torch.Tensor], ...]:
    """Views of the keys and of the values of each layer."""
    heads, size, dim = layout.num_kv_heads, layout.block_size, layout.head_dim
    block = layout.block_bytes // layout.item_bytes
    layer = layout.layer_bytes // layout.item_bytes
    values = layout.key_bytes // layout.item_bytes
    head = size * dim
    key_shape = (layout.num_blocks, heads, size // RUN_TOKENS, dim, RUN_TOKENS)
    key_strides = (block, head, dim * RUN_TOKENS, RUN_TOKENS, 1)
    value_shape = (layout.num_blocks, heads, size, dim)
    value_strides = (block, head, dim, 1)
    starts = range(0, layer * layout.num_layers, layer)
    return (
        [flat.as_strided(key_shape, key_strides, start) for start in starts],
        [flat.as_strided(value_shape, value_strides, start + values) for start in starts],
    )
