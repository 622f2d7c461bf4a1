"""Between the product of q, k and v and attention: norms of heads, rotation, and the KV memory.

One pass: queries go to where attention reads them, keys and values straight into the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.errors import InvariantError
from xllm.worker.triton_kernels.launching import check_contiguous
from xllm.worker.triton_kernels.strides import KvStrides
from xllm.worker.triton_kernels.tiling import power_of_two

_HEADS_AT_ONCE = 8


@triton.jit
def normed_half(half, root, weights, is_query, dims, DIM: tl.constexpr):
    """Half a head [heads, half] divided by its `root` and weighed, each rounded as layers.norm
    does; `weights`: (of queries, of keys), from which `dims` are taken."""
    dtype: tl.constexpr = weights[0].dtype.element_ty
    query_weight = tl.load(weights[0] + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    key_weight = tl.load(weights[1] + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    weight = tl.where(is_query[:, None], query_weight[None, :], key_weight[None, :])
    normed = (half / root[:, None]).to(dtype).to(tl.float32)
    return (normed * weight).to(dtype).to(tl.float32)


@triton.jit
def rope_write_kernel(
    qkv, q, cosines, sines, query_weight, key_weight, row_addresses, positions, key_offset,
    value_offset, eps, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF_PAD: tl.constexpr, NORM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_NUMBERS: tl.constexpr, KEY_HEAD: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """See rope_write. Grid: (rows, groups of heads)."""
    HALF: tl.constexpr = DIM // 2
    dtype: tl.constexpr = q.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    dims = tl.arange(0, HALF_PAD)
    real = (head < HEADS + 2 * KV_HEADS)[:, None] & (dims < HALF)[None, :]
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    place = (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * DIM + dims[None, :]
    first_raw = tl.load(qkv + place, mask=real, other=0.0)
    second_raw = tl.load(qkv + place + HALF, mask=real, other=0.0)
    first, second = first_raw.to(tl.float32), second_raw.to(tl.float32)
    if NORM:
        mean = tl.sum(first * first + second * second, 1) / DIM
        root = tl.sqrt_rn(mean + eps)
        weights = (query_weight, key_weight)
        first = normed_half(first, root, weights, is_query, dims, DIM)
        second = normed_half(second, root, weights, is_query, dims + HALF, DIM)
    cosine = tl.load(cosines + row * HALF + dims, mask=dims < HALF, other=0.0)[None, :]
    sine = tl.load(sines + row * HALF + dims, mask=dims < HALF, other=0.0)[None, :]
    rotated = (first * cosine - second * sine).to(dtype)
    first_out = tl.where(is_value[:, None], first_raw, rotated)
    rotated = (second * cosine + first * sine).to(dtype)
    second_out = tl.where(is_value[:, None], second_raw, rotated)

    queries = q + (row * HEADS + head)[:, None] * DIM + dims[None, :]
    tl.store(queries, first_out, mask=real & is_query[:, None])
    tl.store(queries + HALF, second_out, mask=real & is_query[:, None])

    address, position = tl.load(row_addresses + row), tl.load(positions + row)
    block = tl.cast(position // BLOCK_SIZE, tl.int64) * BLOCK_NUMBERS
    token = tl.multiple_of(address.to(tl.pointer_type(dtype)) + block, 16)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    inside = tl.where(is_value, value_offset, key_offset) + kv_head * KEY_HEAD
    inside += position % BLOCK_SIZE * DIM
    written = token + tl.multiple_of(inside, 8)[:, None] + dims[None, :]
    kept = real & (tl.where(head >= HEADS, address, 0) != 0)[:, None]
    tl.store(written, first_out, mask=kept)
    tl.store(written + HALF, second_out, mask=kept)


def rope_write(
    qkv: torch.Tensor,
    q: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    row_addresses: torch.Tensor,
    positions: torch.Tensor,
    layer: int,
    strides: KvStrides,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """The heads of `qkv` [rows, (heads + 2 kv_heads) * head_dim]: queries into `q`
    [rows, heads, head_dim], keys and values into the KV memory.

    Queries and keys are normed where weights [head_dim] are given (Qwen3), then rotated in fp32 by
    `cosines` and `sines`, fp32 [rows, head_dim / 2] (layers.rotary.Rotary.angles), and rounded
    once. `positions` int32 [rows]; `row_addresses` int64 [rows]: where the slot of each row's
    sequence begins; 0: padding, which writes no key and no value. (With block tables: the address
    of the position's block, less the bytes of the blocks before it.) InvariantError where the
    shapes do not fit.
    """
    check_contiguous(qkv=qkv, q=q, cosines=cosines, sines=sines)
    rows, num_heads, head_dim = q.shape
    total = num_heads + 2 * strides.num_kv_heads
    if strides.values_in_keys or strides.value_numbers_of_token != head_dim:
        raise InvariantError("keys and values of different sizes are written by their model")
    if qkv.shape != (rows, total * head_dim) or head_dim != strides.head_dim:
        raise InvariantError(f"{tuple(qkv.shape)} numbers for {total} heads of {head_dim}")
    if not rows:
        return
    norm = query_weight is not None and key_weight is not None
    offset = layer * strides.layer_numbers
    half_pad = power_of_two(head_dim // 2, 8)
    rope_write_kernel[(rows, -(-total // _HEADS_AT_ONCE))](
        qkv, q, cosines, sines, query_weight if norm else q, key_weight if norm else q,
        row_addresses, positions, offset, offset + strides.value_numbers, eps,
        num_heads, strides.num_kv_heads, head_dim, half_pad, norm,
        strides.block_size, strides.block_numbers, strides.head_numbers, _HEADS_AT_ONCE,
        # 8 numbers a thread: halves of heads move in pieces of 16 bytes.
        num_warps=max(_HEADS_AT_ONCE * half_pad // 256, 1),
    )  # fmt: skip
