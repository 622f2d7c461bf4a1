"""Where the numbers of a block of KV lie on a device, as the kernels count it. Numbers only."""

from __future__ import annotations

import dataclasses

import torch

from xllm.errors import ConfigError
from xllm.worker.memory.device_layout import DeviceLayout


@dataclasses.dataclass(frozen=True, slots=True)
class KvStrides:
    """Distances in numbers of `dtype` between the parts of a block that lies as

        [layer][keys | values][kv_head][token of the block][head_dim]

    A sequence's blocks follow each other from its start address on, so that the place of a number
    is affine in (token // block_size, token % block_size). Raises ConfigError for a block size
    that is no power of two, or distances that no 16-byte load could use.
    """

    block_size: int
    """Tokens of a block, a power of two."""
    block_numbers: int
    """From one block to the next, padding included."""
    layer_numbers: int
    value_numbers: int
    """From the keys of a layer to its values."""
    head_numbers: int
    """From one head's keys to the next one's."""
    num_kv_heads: int
    head_dim: int
    """Numbers of a key."""
    dtype: torch.dtype
    value_dim: int = 0
    """Numbers of a value; 0: as many as of a key."""
    values_in_keys: bool = False
    """The first `value_dim` numbers of a key are the value (the compressed cache of MLA)."""

    def __post_init__(self) -> None:
        size = self.block_size
        if size < 1 or size & (size - 1):
            raise ConfigError(
                f"worker.block_size must be a power of two on a device, not {size}",
                param="worker.block_size",
            )
        distances = (self.block_numbers, self.layer_numbers, self.value_numbers, self.head_numbers)
        for distance in (*distances, self.head_dim, self.value_numbers_of_token):
            if distance * self.dtype.itemsize % 16:
                raise ConfigError(
                    f"worker.device: a head of {self.head_dim} numbers of {self.dtype} does not "
                    "lie in whole 16-byte pieces, as the kernels of a device load it",
                    param="worker.device",
                )
        if self.value_numbers_of_token > self.head_dim:
            raise ConfigError(
                f"worker.device: values of {self.value_dim} numbers behind keys of {self.head_dim}",
                param="worker.device",
            )

    @property
    def value_numbers_of_token(self) -> int:
        """Numbers of a value."""
        return self.value_dim or self.head_dim

    @property
    def value_head_numbers(self) -> int:
        """From one head's values to the next one's."""
        return self.block_size * self.value_numbers_of_token

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


def strides_of(layout: DeviceLayout, dtype: torch.dtype) -> KvStrides:
    """The distances in a device's memory of numbers of `dtype`. ConfigError: see KvStrides."""
    return KvStrides(
        layout.block_size,
        layout.block_numbers,
        layout.layer_numbers,
        layout.value_numbers,
        layout.head_numbers,
        layout.num_kv_heads,
        layout.head_dim,
        dtype,
    )
