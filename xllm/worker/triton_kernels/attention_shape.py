"""What is fixed when an attention kernel is compiled, as one value. Numbers only."""

from __future__ import annotations

import dataclasses

from xllm.worker.triton_kernels.strides import KvStrides
from xllm.worker.triton_kernels.tiling import MIN_ROWS, AttentionTiles, power_of_two


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """A constexpr of the attention kernels: a kernel is compiled for each value.

    The numbers of a key are the first `value_dim`, in a tile of `value_pad`, and the rest, in one
    of `rest_pad` (0: there is no rest): MLA's 576 are 512 + 64, not a padded 1024.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    value_pad: int
    rest_pad: int
    block_size: int
    block_numbers: int
    key_head: int
    """From one head's keys to the next one's, in numbers; `value_head` likewise."""
    value_head: int
    values_in_keys: bool
    softcapped: bool
    window: int
    """Tokens that a row sees, itself included; 0: all before it."""
    tables: bool
    """Whether addresses are of blocks, not of sequences."""
    rows: int
    tile: int
    """Tokens of a tile of keys."""
    stages: int


def attention_shape(
    strides: KvStrides,
    tiles: AttentionTiles,
    *,
    num_heads: int,
    window: int,
    softcapped: bool,
    tables: bool,
) -> AttentionShape:
    """The shape of an attention over KV that lies as `strides` say."""
    value_dim = strides.value_numbers_of_token
    rest = strides.head_dim - value_dim
    return AttentionShape(
        num_heads,
        strides.num_kv_heads,
        strides.head_dim,
        value_dim,
        power_of_two(value_dim, MIN_ROWS),
        power_of_two(rest, MIN_ROWS) if rest else 0,
        strides.block_size,
        strides.block_numbers,
        strides.head_numbers,
        strides.value_head_numbers,
        strides.values_in_keys,
        softcapped,
        window,
        tables,
        tiles.rows,
        tiles.tokens,
        # Where a tile's addresses are loaded first, this many stages keep as many keys under way.
        tiles.num_stages + (2 if tables and tiles.tokens > strides.block_size else 0),
    )
