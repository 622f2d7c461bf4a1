"""Sequences in KV memory as a device has it, and their attention in torch alone, in fp32."""

from __future__ import annotations

import dataclasses
import math
import random

import torch

from tests.worker.triton_interpreter import DEVICE
from xllm.worker.triton_kernels.strides import KvStrides

NUM_LAYERS = 2
LAYER = 1


def strides_of(
    kv_heads, head_dim, block_size, dtype=torch.float32, value_dim=0, in_keys=False, spare=64
):
    """Of blocks of NUM_LAYERS layers, with `spare` numbers of padding."""
    key_numbers = kv_heads * block_size * head_dim
    value_numbers = 0 if in_keys else kv_heads * block_size * (value_dim or head_dim)
    layer_numbers = key_numbers + value_numbers
    return KvStrides(
        block_size,
        NUM_LAYERS * layer_numbers + spare,
        layer_numbers,
        key_numbers,
        block_size * head_dim,
        kv_heads,
        head_dim,
        dtype,
        value_dim,
        in_keys,
    )


@dataclasses.dataclass
class Filled:
    """Keys and values [kv_heads, length, dim] in fp32 of each sequence, and where they are: by
    slots [seqs] and by blocks [seqs, most blocks]. All else in that memory is NaN."""

    strides: KvStrides
    lengths: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    addresses: torch.Tensor
    tables: torch.Tensor
    memory: list[torch.Tensor]

    def lengths_tensor(self):
        return torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)


def fill(strides, lengths, seed=0, lowest=0):
    """Fresh sequences of `lengths` tokens; tokens before `lowest` of each are NaN, too."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // strides.block_size) for length in lengths]
    heads, value_dim = strides.num_kv_heads, strides.value_dim or strides.head_dim
    slots, keys, values = [], [], []
    for length, count in zip(lengths, counts, strict=True):
        k = torch.randn(heads, length, strides.head_dim, generator=generator)
        v = torch.randn(heads, length, value_dim, generator=generator)
        k = k.to(strides.dtype).float()
        v = k[..., :value_dim] if strides.values_in_keys else v.to(strides.dtype).float()
        slot = torch.full((max(count, 1), strides.block_numbers), math.nan, dtype=strides.dtype)
        for token in range(lowest, length):
            write_token(strides, slot, token, k[:, token], v[:, token])
        slots.append(slot)
        keys.append(k)
        values.append(v)
    slots = [slot.to(DEVICE) for slot in slots]
    blocks = [(slot, index) for slot, n in enumerate(counts) for index in range(n)]
    random.Random(seed).shuffle(blocks)
    pool = torch.full((len(blocks) + 1, strides.block_numbers), math.nan, dtype=strides.dtype)
    pool = pool.to(DEVICE)
    tables = torch.zeros((len(lengths), max(counts, default=0) + 1), dtype=torch.int64)
    for place, (sequence, index) in enumerate(blocks):
        pool[place] = slots[sequence][index]
        tables[sequence, index] = pool[place].data_ptr()
    addresses = torch.tensor([slot.data_ptr() for slot in slots], dtype=torch.int64)
    return Filled(
        strides, list(lengths), keys, values, addresses.to(DEVICE), tables.to(DEVICE),
        [*slots, pool],
    )  # fmt: skip


def token_views(strides, slot, token):
    """Views [kv_heads, dim] of the keys and values of a token in a slot [blocks, numbers]."""
    block = slot[token // strides.block_size][LAYER * strides.layer_numbers :]
    inside, dim = token % strides.block_size, strides.head_dim
    value_dim = strides.value_dim or dim
    heads = strides.num_kv_heads
    keys = block.as_strided(
        (heads, dim), (strides.head_numbers, 1), block.storage_offset() + inside * dim
    )
    if strides.values_in_keys:
        return keys, keys[:, :value_dim]
    values = block.as_strided(
        (heads, value_dim),
        (strides.block_size * value_dim, 1),
        block.storage_offset() + strides.value_numbers + inside * value_dim,
    )
    return keys, values


def write_token(strides, slot, token, key, value):
    keys, values = token_views(strides, slot, token)
    keys.copy_(key)
    if not strides.values_in_keys:
        values.copy_(value)


def attention_of(q, keys, values, positions, scale, window=0, softcap=0.0):
    """Attention [rows, heads, value_dim] of q [rows, heads, dim] at `positions` [rows], fp32."""
    group = q.shape[1] // keys.shape[0]
    keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    if not keys.shape[1]:
        return torch.zeros(q.shape[0], q.shape[1], values.shape[-1])
    scores = torch.einsum("rhd,htd->hrt", q.float(), keys) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    tokens = torch.arange(keys.shape[1])
    hidden = tokens[None, :] > positions[:, None]
    if window:
        hidden |= tokens[None, :] <= positions[:, None] - window
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing
    return torch.einsum("hrt,htd->rhd", weights, values)
