"""The KV pool: per layer two tensors [num_blocks, block_size, kv_heads, head_dim].

It holds bytes and copies blocks; which block belongs to whom is the master's. Its memory is a
descriptor that it is given. Invariant: where attention may read, there are finite numbers, for a
masked position is multiplied by zero and zero times NaN is NaN; `may_hold_nan` says that a
sequence has left others, and then the tails of blocks are cleared before they are read.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Sequence

import torch

from xllm.errors import InvariantError
from xllm.worker.memory.layout import KvLayout


@dataclasses.dataclass(frozen=True, slots=True)
class PoolMemory:
    """Memory for a pool: a flat tensor of its type, zeroed, of at least the layout's size; and
    where it comes from ("private", or the name of an arena)."""

    tensor: torch.Tensor
    origin: str = "private"


@dataclasses.dataclass(frozen=True, slots=True)
class KvPoolStatistics:
    """A pool at a glance."""

    num_blocks: int
    total_bytes: int
    num_copies: int


def allocate_memory(layout: KvLayout, dtype: torch.dtype, device: torch.device) -> PoolMemory:
    """Private zeroed memory of the layout's size. On a CPU it is mapped and not filled: pages
    that no sequence has touched cost neither memory nor time."""
    if device.type != "cpu":
        numbers = layout.total_bytes // layout.item_bytes
        return PoolMemory(torch.zeros(numbers, dtype=dtype, device=device))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return PoolMemory(torch.frombuffer(mmap.mmap(-1, layout.total_bytes, flags), dtype=dtype))


class KvPool:
    """Keys and values of all layers, addressed by block id or by slot (block * size + offset)."""

    def __init__(self, layout: KvLayout, memory: PoolMemory) -> None:
        needed = layout.total_bytes // layout.item_bytes
        if memory.tensor.numel() < needed:
            raise InvariantError(
                f"the pool needs {needed} numbers, its memory has {memory.tensor.numel()}"
            )
        self.layout = layout
        self.may_hold_nan = False
        self._origin = memory.origin
        self._num_copies = 0
        shape = (layout.num_layers, 2, layout.num_blocks, layout.block_size)
        # Axes: layer, key or value, block, token, head, number.
        self._data = memory.tensor[:needed].view(*shape, layout.num_kv_heads, layout.head_dim)
        token = layout.num_kv_heads * layout.head_dim
        # Views by slot (for writing) and by block (for gathering), made once.
        self._slots = self._data.view(
            layout.num_layers, 2, -1, layout.num_kv_heads, layout.head_dim
        )
        self._blocks = self._data.view(
            layout.num_layers, 2, layout.num_blocks, layout.block_size * token
        )

    def keys(self, layer: int) -> torch.Tensor:
        """[num_blocks, block_size, kv_heads, head_dim] of a layer."""
        return self._data[layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        """[num_blocks, block_size, kv_heads, head_dim] of a layer."""
        return self._data[layer, 1]

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [rows, kv_heads, head_dim] at slots [rows] (int64, distinct)."""
        self._slots[layer, 0].index_copy_(0, slots, k)
        self._slots[layer, 1].index_copy_(0, slots, v)

    def gather(
        self, layer: int, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy blocks [count] (int64) into keys and values, each [count, block numbers]."""
        torch.index_select(self._blocks[layer, 0], 0, block_ids, out=keys)
        torch.index_select(self._blocks[layer, 1], 0, block_ids, out=values)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers, one after the other where a
        source is a destination too."""
        if not pairs:
            return
        self._num_copies += len(pairs)
        sources, destinations = zip(*pairs, strict=True)
        if set(sources) & set(destinations) or len(set(destinations)) < len(destinations):
            for source, destination in pairs:
                self._data[:, :, destination] = self._data[:, :, source]
            return
        device = self._data.device
        source_ids = torch.tensor(sources, dtype=torch.int64, device=device)
        destination_ids = torch.tensor(destinations, dtype=torch.int64, device=device)
        self._data.index_copy_(2, destination_ids, self._data.index_select(2, source_ids))

    def clear_slots(self, slots: Sequence[int]) -> None:
        """Zero these slots in all layers."""
        index = torch.tensor(slots, dtype=torch.int64, device=self._data.device)
        self._slots.index_fill_(2, index, 0)

    def forget(self) -> None:
        """Nothing of what it holds matters any more: numbers that are not finite become zeros,
        the rest stays (untouched memory is not made real by looking at it)."""
        if not self.may_hold_nan:
            return
        for layer in self._blocks:
            for blocks in layer:
                blocks[~blocks.isfinite().all(dim=1)] = 0
        self.may_hold_nan = False

    def give_back(self) -> None:
        """It keeps its memory, and what is in there."""

    def take_back(self) -> None:
        """It has its memory."""

    def close(self) -> None:
        """Its memory goes with the last tensor over it."""

    def statistics(self) -> KvPoolStatistics:
        """Its size and what was copied."""
        return KvPoolStatistics(self.layout.num_blocks, self.layout.total_bytes, self._num_copies)

    def check(self) -> None:
        """Raise InvariantError where the pool holds numbers that are not finite, unnoticed."""
        if self.may_hold_nan:
            return
        for layer, data in enumerate(self._data):
            if not bool(torch.isfinite(data).all()):
                raise InvariantError(
                    f"the KV pool ({self._origin}): layer {layer} holds NaN or infinity unnoticed"
                )
