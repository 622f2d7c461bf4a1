"""Attention of prompts: the last rows of several sequences, packed, against all of their keys.

A chunk behind a prefix is the same case as a whole prompt: its rows' own keys are in the KV memory
already. A program takes a tile of one sequence's rows, all heads that share keys among them, and
walks over the keys that its last row sees (FlashAttention-2: Dao, 2023). Tiles that none of its
rows may see are not visited, and only those at the diagonal and at the window's edge are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.triton_kernels.attention_shape import attention_shape
from xllm.worker.triton_kernels.attention_tile import (
    attend_range,
    empty_state,
    load_key_parts,
    weighted,
)
from xllm.worker.triton_kernels.launching import attention_scales, check_contiguous
from xllm.worker.triton_kernels.strides import KvStrides
from xllm.worker.triton_kernels.tiling import prefill_tiles


@triton.jit
def key_ranges(first_position, last_position, S: tl.constexpr):
    """(begin, first whole, end of whole) of the tiles of keys that rows from `first_position` to
    `last_position` see, in tokens: those from `first whole` to `end of whole` are seen whole by
    every row, those before and behind by some in part."""
    TILE: tl.constexpr = S.tile
    WINDOW: tl.constexpr = S.window
    whole_end = (first_position + 1) // TILE * TILE
    begin = first_position * 0
    whole = begin
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
        whole = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), TILE) * TILE
        whole = tl.minimum(whole, whole_end)
    return begin, whole, whole_end


@triton.jit
def prefill_kernel(
    q, out, row_starts, row_tiles, addresses, lengths, width, key_offset, value_offset, scale,
    softcap, HEAD_TILES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """See prefill_attention. Grid: (kv heads x tiles of a group's heads, row tiles)."""
    HEADS: tl.constexpr = S.num_heads
    GROUP: tl.constexpr = S.num_heads // S.num_kv_heads
    TILE_HEADS: tl.constexpr = GROUP if S.rows > GROUP else S.rows
    TILE_TOKENS: tl.constexpr = S.rows // TILE_HEADS
    KEY_DIM: tl.constexpr = S.key_dim
    VALUE_DIM: tl.constexpr = S.value_dim
    VALUE_PAD: tl.constexpr = S.value_pad
    ROWS: tl.constexpr = S.rows
    sequence = tl.load(row_tiles + 2 * tl.program_id(1))
    if sequence < 0:
        return
    first = tl.load(row_tiles + 2 * tl.program_id(1) + 1)
    start = tl.load(row_starts + sequence)
    count = tl.load(row_starts + sequence + 1) - start
    if first >= count:
        return
    kv_head = tl.program_id(0) // HEAD_TILES
    row = tl.arange(0, ROWS)
    token_row = first + row // TILE_HEADS
    head = tl.program_id(0) % HEAD_TILES * TILE_HEADS + row % TILE_HEADS
    real = (row < TILE_TOKENS * TILE_HEADS) & (token_row < count) & (head < GROUP)
    before = tl.load(lengths + sequence) - count
    last = before + tl.minimum(first + TILE_TOKENS, count) - 1
    places = (start + token_row).to(tl.int64) * HEADS + kv_head * GROUP + head
    queries = load_key_parts(q + places * KEY_DIM, real, S, True)
    positions = before + token_row
    keys = key_offset + kv_head * S.key_head
    values = value_offset + kv_head * S.value_head
    begin, whole, whole_end = key_ranges(before + first, last, S)
    lowest = before + first - S.window + 1 if S.window > 0 else 0
    state = empty_state(S)
    if S.window > 0:
        state = attend_range(
            state, queries, positions, addresses, sequence, width, keys, values,
            begin, whole, lowest, scale, softcap, S, True,
        )  # fmt: skip
    state = attend_range(
        state, queries, positions, addresses, sequence, width, keys, values,
        whole, whole_end, lowest, scale, softcap, S, False,
    )  # fmt: skip
    state = attend_range(
        state, queries, positions, addresses, sequence, width, keys, values,
        whole_end, last + 1, lowest, scale, softcap, S, True,
    )  # fmt: skip
    dims = tl.arange(0, VALUE_PAD)
    to = out + places[:, None] * VALUE_DIM + dims[None, :]
    attended = weighted(state[1], state[2]).to(out.dtype.element_ty)
    tl.store(to, attended, mask=real[:, None] & (dims < VALUE_DIM)[None, :])


def prefill_attention(
    q: torch.Tensor,
    out: torch.Tensor,
    row_starts: torch.Tensor,
    row_tiles: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    layer: int,
    strides: KvStrides,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """The attention of `q` [rows, heads, head_dim] into `out` [rows, heads, value_dim].

    The rows from row_starts[i] to row_starts[i + 1] (int32 [seqs + 1]) are the last ones of
    sequence i's `lengths` [seqs] (int32) tokens; each sees the keys up to its own position,
    `window` of them (0: all). Rows that belong to no sequence keep what `out` holds. `addresses`
    int64: of each slot [seqs], or of each block [seqs, blocks].

    `row_tiles` int32 [tiles, 2] says which rows a program takes: `tiling.row_tiles` with
    `tiling.tile_tokens`, made with the batch. The grid has as many programs as it has room for, so
    that a captured graph serves other batches. The bits of a row depend on its own sequence alone,
    not on how it was cut into chunks: keys are always cut at the same tokens, and a tile that a row
    may not see changes nothing in it.
    """
    check_contiguous(q=q, out=out, row_starts=row_starts, row_tiles=row_tiles, lengths=lengths)
    num_heads = q.shape[1]
    if not row_tiles.shape[0]:
        return
    tiles = prefill_tiles(strides)
    shape = attention_shape(
        strides,
        tiles,
        num_heads=num_heads,
        window=window,
        softcapped=softcap != 0.0,
        tables=addresses.ndim == 2,
    )
    offset = layer * strides.layer_numbers
    before, behind = attention_scales(scale, softcap)
    group = num_heads // strides.num_kv_heads
    head_tiles = -(-group // tiles.rows)
    prefill_kernel[(strides.num_kv_heads * head_tiles, row_tiles.shape[0])](
        q, out, row_starts, row_tiles, addresses, lengths, addresses.stride(0),
        offset, offset + strides.value_numbers, before, behind, head_tiles, shape,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
