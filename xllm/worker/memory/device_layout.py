"""How a block of KV lies in the memory of a GPU or an NPU: all layers of a block side by side.

    block = [layer][keys | values][kv_head][token of the block][head_dim], rounded up to whole pages

A block is the unit of mapping, in pages of the device (2 MiB). In a slot the blocks of a sequence
follow each other, so that a kernel gets a start address and a length:

    address(token t) = start + t // block_size * block_bytes + layer * layer_bytes
                     + (0 | key_bytes) + head * head_bytes + t % block_size * head_dim * item_bytes

Numbers only.
"""

from __future__ import annotations

import dataclasses

from xllm.errors import ConfigError

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Tokens of a block, where they are chosen here: prefixes are shared by whole blocks."""

_MOST_WASTE = 16
"""A block may waste one in so many of its bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Blocks of `block_size` tokens (a power of two) over pages of `granularity` bytes; ids 0 to
    num_blocks - 1. Raises ConfigError for another block size."""

    num_blocks: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    granularity: int

    def __post_init__(self) -> None:
        size = self.block_size
        if size < 1 or size & (size - 1):
            raise ConfigError(
                f"worker.block_size must be a power of two, or 0, on this device, not {size}",
                param="worker.block_size",
            )

    @property
    def scale_bytes(self) -> int:
        """Numbers have no scales here."""
        return 0

    @property
    def head_bytes(self) -> int:
        """Keys of a block in one layer and head: the next head's begin so far behind."""
        return self.block_size * self.head_dim * self.item_bytes

    @property
    def key_bytes(self) -> int:
        """Keys of a block in one layer: the values begin so far behind its layer's start."""
        return self.num_kv_heads * self.head_bytes

    @property
    def layer_bytes(self) -> int:
        """Keys and values of a block in one layer."""
        return 2 * self.key_bytes

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return self.layer_bytes // self.block_size

    @property
    def block_bytes(self) -> int:
        """A block of all layers, with the bytes that fill its last page."""
        used = self.layer_bytes * self.num_layers
        return -(-used // self.granularity) * self.granularity

    @property
    def wasted_bytes(self) -> int:
        """Bytes of a block that hold nothing."""
        return self.block_bytes - self.layer_bytes * self.num_layers

    @property
    def total_bytes(self) -> int:
        """All blocks."""
        return self.block_bytes * self.num_blocks

    @property
    def block_numbers(self) -> int:
        """`block_bytes` in numbers, as kernels count."""
        return self.block_bytes // self.item_bytes

    @property
    def layer_numbers(self) -> int:
        """`layer_bytes` in numbers."""
        return self.layer_bytes // self.item_bytes

    @property
    def value_numbers(self) -> int:
        """`key_bytes` in numbers."""
        return self.key_bytes // self.item_bytes

    @property
    def head_numbers(self) -> int:
        """`head_bytes` in numbers."""
        return self.head_bytes // self.item_bytes

    def offset(self, token: int, layer: int, head: int, *, is_value: bool) -> int:
        """Bytes from the start of a slot to a token's key or value in a layer and head."""
        block, place = divmod(token, self.block_size)
        return (
            block * self.block_bytes
            + layer * self.layer_bytes
            + is_value * self.key_bytes
            + head * self.head_bytes
            + place * self.head_dim * self.item_bytes
        )


def choose_block_size(token_bytes: int, granularity: int) -> int:
    """Tokens of a block whose tokens take so many bytes in all layers: the fewest that waste at
    most a sixteenth of its pages, else those that waste the least."""

    def wasted(size: int) -> tuple[int, int]:
        """(bytes wasted, bytes of the pages)."""
        used = size * token_bytes
        whole = -(-used // granularity) * granularity
        return whole - used, whole

    for size in BLOCK_SIZES:
        waste, whole = wasted(size)
        if waste * _MOST_WASTE <= whole:
            return size
    return min(BLOCK_SIZES, key=lambda size: wasted(size)[0] / wasted(size)[1])
