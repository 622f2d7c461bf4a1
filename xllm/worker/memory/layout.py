"""How much memory a block of KV takes, and how many blocks there shall be. Numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.errors import ConfigError
from xllm.protocol.step import KvGroup
from xllm.worker.loader.kv_groups import KvGroupSpec


@dataclasses.dataclass(frozen=True, slots=True)
class KvLayout:
    """Blocks of `block_size` tokens; a block id stands for that block in every layer."""

    num_blocks: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def scale_bytes(self) -> int:
        """Numbers have no scales here."""
        return 0

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        """One block over all layers."""
        return self.token_bytes * self.block_size * self.num_layers

    @property
    def total_bytes(self) -> int:
        """All blocks."""
        return self.block_bytes * self.num_blocks


def choose_num_blocks(
    *,
    asked_bytes: int,
    budget_bytes: int,
    bytes_per_block: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
) -> int:
    """How many blocks to allocate.

    `asked_bytes` > 0 is taken as it is; 0 takes the budget, but no more than max_num_seqs
    sequences of max_model_len could use. Raises ConfigError where not two blocks fit.
    """
    # One block a sequence is to spare: the copy that a fork makes of its last one.
    wanted = max_num_seqs * (-(-max_model_len // block_size) + 1)
    return count_blocks(asked_bytes, budget_bytes, bytes_per_block, wanted)


def count_blocks(asked_bytes: int, budget_bytes: int, bytes_per_block: int, wanted: int) -> int:
    """How many blocks the bytes asked for hold; where none are, the budget, but no more than are
    `wanted`. ConfigError where not two fit."""
    if asked_bytes:
        num_blocks = asked_bytes // bytes_per_block
    else:
        num_blocks = min(budget_bytes // bytes_per_block, wanted)
    if num_blocks < 2:
        raise ConfigError(
            f"worker.kv_cache_bytes: {asked_bytes or budget_bytes} bytes hold {num_blocks} blocks "
            f"of {bytes_per_block} bytes; at least 2 are needed",
            param="worker.kv_cache_bytes",
        )
    return num_blocks


def describe_groups(
    groups: Sequence[KvGroupSpec], item_bytes: int, scale_bytes: int = 0
) -> tuple[KvGroup, ...]:
    """The groups as the master is told of them. `scale_bytes`: see BlockLayout."""
    return tuple(
        KvGroup(
            group.name,
            _token_bytes(group, item_bytes, scale_bytes),
            group.window,
            len(group.layers),
        )
        for group in groups
    )


def _token_bytes(group: KvGroupSpec, item_bytes: int, scale_bytes: int = 0) -> int:
    head_bytes = group.head_dim * item_bytes + scale_bytes
    return 2 * group.num_kv_heads * head_bytes * len(group.layers)
