"""Attention of decodes: one or a few rows a sequence against all of its keys, read once.

A program takes one head of keys of one sequence, the heads that share it as the rows of a product,
and one part of the sequence; a second kernel puts the parts together by their log-sum-exps
(Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023). Grids follow from what the host knows: a
program beyond its sequence's end returns at once, so that a captured graph serves other lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.errors import InvariantError
from xllm.worker.triton_kernels.attention_shape import AttentionShape, attention_shape
from xllm.worker.triton_kernels.attention_tile import (
    attend_range,
    empty_state,
    load_key_parts,
    weighted,
)
from xllm.worker.triton_kernels.launching import (
    attention_scales,
    check_contiguous,
    multiprocessors,
)
from xllm.worker.triton_kernels.strides import KvStrides
from xllm.worker.triton_kernels.tiling import MIN_SPLIT_TOKENS, DecodeCut, cut_decode

_MERGED_AT_ONCE = 8
_MIN_SPLIT_TOKENS = tl.constexpr(MIN_SPLIT_TOKENS)


@triton.jit
def split_range(length, splits, M: tl.constexpr, SPLIT_TOKENS: tl.constexpr, S: tl.constexpr):
    """(first token read, the token that splits count from, tokens of a split) of a sequence, in
    whole tiles. Of the `splits` that there is room for a short sequence takes a few, so that one
    grid serves every length."""
    WINDOW: tl.constexpr = S.window
    TILE: tl.constexpr = S.tile
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - M - WINDOW + 1, 0) // TILE * TILE
    if SPLIT_TOKENS > 0:
        return first, length * 0, length * 0 + SPLIT_TOKENS
    taken = tl.maximum(tl.minimum(splits, tl.cdiv(length - first, _MIN_SPLIT_TOKENS)), 1)
    each = tl.cdiv(tl.cdiv(length - first, taken), TILE) * TILE
    return first, first, tl.maximum(each, TILE)


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    q, out, parts, logs, addresses, lengths, width, key_offset, value_offset, scale, softcap,
    splits, M: tl.constexpr, ROW_TILES: tl.constexpr, SPLIT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """See decode_attention. Grid: (kv heads x row tiles, splits, sequences)."""
    HEADS: tl.constexpr = S.num_heads
    GROUP: tl.constexpr = S.num_heads // S.num_kv_heads
    KEY_DIM: tl.constexpr = S.key_dim
    VALUE_DIM: tl.constexpr = S.value_dim
    VALUE_PAD: tl.constexpr = S.value_pad
    ROWS: tl.constexpr = S.rows
    kv_head = tl.program_id(0) // ROW_TILES
    part, sequence = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    first, origin, each = split_range(length, splits, M, SPLIT_TOKENS, S)
    begin = tl.maximum(origin + part * each, first)
    end = tl.minimum(origin + (part + 1) * each, length)
    if SPLIT:  # noqa: SIM102  # decided when it is compiled, unlike the other
        if begin >= end:
            return  # the merge does not look for it
    row = tl.program_id(0) % ROW_TILES * ROWS + tl.arange(0, ROWS)
    real = row < M * GROUP
    positions = length - M + row // GROUP
    places = (sequence * M + row // GROUP).to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP
    state = attend_range(
        empty_state(S),
        load_key_parts(q + places * KEY_DIM, real, S, True),
        positions, addresses, sequence, width,
        key_offset + kv_head * S.key_head,
        value_offset + kv_head * S.value_head,
        begin, end, length - M - S.window + 1 if S.window > 0 else 0, scale, softcap, S, True,
    )  # fmt: skip
    attended = weighted(state[1], state[2])
    dims = tl.arange(0, VALUE_PAD)
    mask = real[:, None] & (dims < VALUE_DIM)[None, :]
    if SPLIT:
        places = places * splits + part
        tl.store(parts + places[:, None] * VALUE_DIM + dims[None, :], attended, mask=mask)
        log = state[0] + tl.log2(tl.where(state[1] == 0.0, 1.0, state[1]))
        tl.store(logs + places, log, mask=real)
    else:
        to = out + places[:, None] * VALUE_DIM + dims[None, :]
        tl.store(to, attended.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    out, parts, logs, lengths, splits, M: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    AT_ONCE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Weighs the parts of a row by their sums; grid: (rows x heads). The parts come in order, a
    few at a time, so that a row's bits depend on its own parts alone."""
    HEADS: tl.constexpr = S.num_heads
    VALUE_DIM: tl.constexpr = S.value_dim
    VALUE_PAD: tl.constexpr = S.value_pad
    place = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + place // (HEADS * M))
    first, origin, each = split_range(length, splits, M, SPLIT_TOKENS, S)
    dims = tl.arange(0, VALUE_PAD)
    largest = first * 0.0 + float("-inf")
    total = first * 0.0
    sums = tl.zeros((VALUE_PAD,), tl.float32)
    for start in tl.range((first - origin) // each, tl.cdiv(length - origin, each), AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        there = part < tl.cdiv(length - origin, each)
        log = tl.load(logs + place * splits + part, mask=there, other=float("-inf"))
        found = tl.load(
            parts + (place * splits + part)[:, None] * VALUE_DIM + dims[None, :],
            mask=there[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        new = tl.maximum(largest, tl.max(log, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(log - base)
        kept = tl.exp2(largest - base)
        total = total * kept + tl.sum(weights, 0)
        sums = sums * kept + tl.sum(found * weights[:, None], 0)
        largest = new
    sums /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + place * VALUE_DIM + dims, sums.to(out.dtype.element_ty), mask=dims < VALUE_DIM)


def decode_attention(
    q: torch.Tensor,
    out: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    layer: int,
    strides: KvStrides,
    *,
    scale: float,
    max_length: int,
    scratch: torch.Tensor,
    window: int = 0,
    softcap: float = 0.0,
    split_tokens: int = 0,
) -> None:
    """The attention of `q` [seqs, m, heads, head_dim] into `out` [seqs, m, heads, value_dim].

    Row j of a sequence of `lengths` [seqs] (int32) keys stands at position length - m + j and sees
    the keys up to there, `window` of them (0: all); its own are in the KV memory already. A row at
    a position below 0, as of an empty sequence, becomes zeros, and no memory is read. `addresses`
    int64: of each slot [seqs], or of each block [seqs, blocks]. `max_length`: programs are made for
    so many keys; shorter sequences leave some without work, longer ones give each more.

    `scratch`: fp32, as many numbers as `decode_cut(...).scratch_numbers(...)`; layers may share it.
    With `split_tokens` the bits of a row do not depend on what else is in the batch, nor on
    `max_length`. Launches two kernels at most, and waits for nothing.
    """
    check_contiguous(q=q, out=out, lengths=lengths)
    num_seqs, m, num_heads, _ = q.shape
    cut = decode_cut(q, strides, max_length=max_length, split_tokens=split_tokens)
    numbers = cut.scratch_numbers(num_seqs * m * num_heads, strides.value_numbers_of_token)
    if scratch.numel() < numbers:
        raise InvariantError(f"scratch of {scratch.numel()} numbers where {numbers} are needed")
    if not num_seqs * m:
        return
    shape = attention_shape(
        strides,
        cut.tiles,
        num_heads=num_heads,
        window=window,
        softcapped=softcap != 0.0,
        tables=addresses.ndim == 2,
    )
    _launch(q, out, addresses, lengths, layer, strides, cut, shape, scratch, scale, softcap)


def decode_cut(
    q: torch.Tensor, strides: KvStrides, *, max_length: int, split_tokens: int = 0
) -> DecodeCut:
    """How `decode_attention` cuts the work on q's device."""
    return cut_decode(
        strides,
        num_seqs=q.shape[0],
        num_rows=q.shape[1],
        num_heads=q.shape[2],
        max_length=max_length,
        multiprocessors=multiprocessors(q.device),
        split_tokens=split_tokens,
    )


def _launch(
    q: torch.Tensor,
    out: torch.Tensor,
    addresses: torch.Tensor,
    lengths: torch.Tensor,
    layer: int,
    strides: KvStrides,
    cut: DecodeCut,
    shape: AttentionShape,
    scratch: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    num_seqs, m, num_heads, _ = q.shape
    rows = num_seqs * m * num_heads
    parts = scratch[: rows * cut.splits * shape.value_dim]
    logs = scratch[rows * cut.splits * shape.value_dim :]
    offset = layer * strides.layer_numbers
    before, behind = attention_scales(scale, softcap)
    split = cut.splits > 1
    decode_kernel[(shape.num_kv_heads * cut.row_tiles, cut.splits, num_seqs)](
        q, out, parts, logs, addresses, lengths, addresses.stride(0),
        offset, offset + strides.value_numbers, before, behind, cut.splits,
        m, cut.row_tiles, split, cut.split_tokens, shape,
        num_warps=cut.tiles.num_warps, num_stages=cut.tiles.num_stages,
    )  # fmt: skip
    if split:
        merge_kernel[(rows,)](
            out, parts, logs, lengths, cut.splits, m, cut.split_tokens, _MERGED_AT_ONCE, shape,
            num_warps=1,
        )  # fmt: skip
