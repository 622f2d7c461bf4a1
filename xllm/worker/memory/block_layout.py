"""How a block of KV lies in memory on a CPU: all layers of a block side by side.

    block = [layer][keys | values | scales], rounded up to whole pages of the machine
    keys    [kv_head][block_size / 16][head_dim][16]: runs of 16 tokens, transposed
    values  [kv_head][block_size][head_dim]
    scales  where numbers are rounded to 8 bits: [keys | values][kv_head][block_size] float32

A block is the unit of mapping: in a slot the address of a token is affine in its position. Runs
are transposed so that a product of one query with 16 keys reads whole vectors. Numbers only.
"""

from __future__ import annotations

import dataclasses
import mmap

from xllm.errors import ConfigError

RUN_TOKENS = 16
"""Tokens of a run of transposed keys."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockLayout:
    """Blocks of `block_size` tokens (a power of two, at least a run); ids 0 to num_blocks - 1.
    Raises ConfigError for another block size."""

    num_blocks: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    scale_bytes: int = 0
    """Of the scale that a token's keys, or values, have in a head; 0: there is none."""
    page_bytes: int = 0
    """Of a page where other models have larger blocks; 0: a block is one."""

    def __post_init__(self) -> None:
        size = self.block_size
        if size < RUN_TOKENS or size & (size - 1):
            raise ConfigError(
                f"worker.block_size must be a power of two of at least {RUN_TOKENS} on a CPU, "
                f"not {size}",
                param="worker.block_size",
            )

    @property
    def key_bytes(self) -> int:
        """Keys of a block in one layer: the values begin so far behind its layer's start."""
        return self.num_kv_heads * self.block_size * self.head_dim * self.item_bytes

    @property
    def layer_bytes(self) -> int:
        """Keys and values of a block in one layer, and their scales."""
        return 2 * (self.key_bytes + self.num_kv_heads * self.block_size * self.scale_bytes)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return self.layer_bytes // self.block_size

    @property
    def block_bytes(self) -> int:
        """A block of all layers, with the bytes that fill its page."""
        used = self.layer_bytes * self.num_layers
        return max(-(-used // mmap.PAGESIZE) * mmap.PAGESIZE, self.page_bytes)

    @property
    def wasted_bytes(self) -> int:
        """Bytes of a block that hold nothing."""
        return self.block_bytes - self.layer_bytes * self.num_layers

    @property
    def total_bytes(self) -> int:
        """All blocks."""
        return self.block_bytes * self.num_blocks
