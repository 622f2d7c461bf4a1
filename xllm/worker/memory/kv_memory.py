"""What the engine needs of a KV memory, whatever device it is on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from xllm.worker.memory.pool import KvPoolStatistics


class KvShape(Protocol):
    """The sizes of a memory's blocks."""

    @property
    def num_blocks(self) -> int:
        """Block ids are 0 to num_blocks - 1."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def num_kv_heads(self) -> int:
        """Heads that have keys of their own."""

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""

    @property
    def block_bytes(self) -> int:
        """A block of all layers."""

    @property
    def item_bytes(self) -> int:
        """Of a number."""

    @property
    def scale_bytes(self) -> int:
        """Of the scale that a token's keys, or values, have in a head; 0: there is none."""


class KvMemory(Protocol):
    """Blocks of keys and values in all layers; see `pool`, `cpu_memory` and `device_memory`."""

    may_hold_nan: bool

    @property
    def layout(self) -> KvShape:
        """How large it is."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [rows, kv_heads, head_dim] at places [rows] (block * size + offset)."""

    def gather(
        self, layer: int, block_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy blocks [count] token by token into keys and values [count, block numbers]."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in all layers, in order."""

    def clear_slots(self, slots: Sequence[int]) -> None:
        """Zero these places in all layers."""

    def forget(self) -> None:
        """Make numbers that are not finite zeros."""

    def give_back(self) -> None:
        """Give its memory back to the device while its owner sleeps, where that can be. Slots must
        be unmapped before; nothing may run that uses it."""

    def take_back(self) -> None:
        """Have memory again after `give_back`, all zeros. EngineError where there is none left: it
        may be tried again."""

    def close(self) -> None:
        """Give all up. Slots must be closed before; nothing may use it any more."""

    def statistics(self) -> KvPoolStatistics:
        """Its size and what was copied."""

    def check(self) -> None:
        """Raise InvariantError where it holds numbers that are not finite, unnoticed."""
