"""What the attention kernels share: reaching a tile of keys, and the online softmax over tiles.

Softmax over tiles after Milakov and Gimelshein (2018) and Dao et al. (2022): a row keeps the
largest score so far, the sum of its weights below it and the weighted sum of values, in fp32.
Scores are in units of log2, since a GPU has exp2 in hardware. `S` is an AttentionShape.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_pointers(table, slot, tokens, present, start, S: tl.constexpr):
    """Where the blocks of `tokens` [tile] begin, the first of which is `start`, a multiple of the
    tile: one pointer where a block holds a whole tile, else [tile] of them. With S.tables a
    block's address is read from the sequence's `table`, where tokens are `present`; else it follows
    from `slot`, where the sequence begins."""
    BLOCK: tl.constexpr = S.block_size
    BLOCK_NUMBERS: tl.constexpr = S.block_numbers
    TILE: tl.constexpr = S.tile
    blocks = start // BLOCK if TILE <= BLOCK else tokens // BLOCK
    if not S.tables:
        begins = slot + tl.cast(blocks, tl.int64) * BLOCK_NUMBERS
    elif TILE <= BLOCK:
        begins = tl.load(table + blocks).to(slot.dtype)
    else:
        begins = tl.load(table + blocks, mask=present, other=0).to(slot.dtype)
    return begins


@triton.jit
def load_rows(
    pointers, present, FIRST: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """COUNT numbers from FIRST on of each of `pointers` [rows], as [rows, PADDED]: zeros
    behind COUNT and, where MASKED, in rows that are not `present`, whose memory is not read."""
    dims = tl.arange(0, PADDED)
    places = pointers[:, None] + (FIRST + dims)[None, :]
    if MASKED:
        if COUNT == PADDED:
            return tl.load(places, mask=present[:, None], other=0.0)
        return tl.load(places, mask=present[:, None] & (dims < COUNT)[None, :], other=0.0)
    if COUNT == PADDED:
        return tl.load(places)
    return tl.load(places, mask=(dims < COUNT)[None, :], other=0.0)


@triton.jit
def load_key_parts(pointers, present, S: tl.constexpr, MASKED: tl.constexpr):
    """(first part, rest) of rows of a key's length; without a rest the first part stands twice."""
    KEY_DIM: tl.constexpr = S.key_dim
    VALUE_DIM: tl.constexpr = S.value_dim
    VALUE_PAD: tl.constexpr = S.value_pad
    REST_PAD: tl.constexpr = S.rest_pad
    first = load_rows(pointers, present, 0, VALUE_DIM, VALUE_PAD, MASKED)
    rest = first
    if REST_PAD > 0:
        rest = load_rows(pointers, present, VALUE_DIM, KEY_DIM - VALUE_DIM, REST_PAD, MASKED)
    return first, rest


@triton.jit
def empty_state(S: tl.constexpr):
    """(largest score [rows], sum of weights [rows], weighted values [rows, value_pad]) of rows that
    have seen nothing."""
    ROWS: tl.constexpr = S.rows
    VALUE_PAD: tl.constexpr = S.value_pad
    return (
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, VALUE_PAD), tl.float32),
    )


@triton.jit
def scores_of(
    queries, keys, positions, tokens, present, scale, softcap,
    S: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores [rows, tile] in log2 units, -inf where a row may not look. `scale` takes products
    there; where they are capped, to the tanh's argument, times 2 log2(e), and `softcap` back."""
    WINDOW: tl.constexpr = S.window
    # Without input_precision fp32 would be rounded to TF32.
    scores = tl.dot(queries[0], tl.trans(keys[0]), input_precision="ieee")
    if S.rest_pad > 0:
        scores = tl.dot(queries[1], tl.trans(keys[1]), scores, input_precision="ieee")
    scores *= scale
    if S.softcapped:
        scores = (1.0 - 2.0 / (1.0 + tl.exp2(scores))) * softcap  # tanh
    if MASKED:
        seen = (tokens[None, :] <= positions[:, None]) & present[None, :]
        if WINDOW > 0:
            seen &= tokens[None, :] > positions[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def attend_range(
    state, queries, positions, addresses, sequence, width, key_offset, value_offset, begin, end,
    lowest, scale, softcap, S: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`state` (see empty_state) after the keys of a sequence from `begin` (a multiple of the tile)
    to `end`, for rows at `positions` with `queries` (see load_key_parts).

    Where MASKED, a row sees the keys up to its position that are in the window, and memory before
    `lowest` or behind `end` is not read: NaN there cannot spread, and pages may be absent. Else
    every row sees every key, and `end` is a multiple of the tile, too."""
    BLOCK: tl.constexpr = S.block_size
    TILE: tl.constexpr = S.tile
    VALUE_DIM: tl.constexpr = S.value_dim
    VALUE_PAD: tl.constexpr = S.value_pad
    KEY_DIM: tl.constexpr = S.key_dim
    STAGES: tl.constexpr = S.stages
    dtype: tl.constexpr = queries[0].dtype
    row_max, row_sum, sums = state
    table = addresses + sequence * width
    slot = tl.load(table).to(tl.pointer_type(dtype))
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = start + tl.arange(0, TILE)
        present = (tokens < end) & (tokens >= lowest)
        begins = block_pointers(table, slot, tokens, present, start, S)
        # Every token begins at a multiple of 16 bytes (KvStrides sees to that): the hint is what
        # makes loads 16 bytes wide.
        pointers = tl.multiple_of(begins + (key_offset + tokens % BLOCK * KEY_DIM), 16)
        keys = load_key_parts(pointers, present, S, MASKED)
        scores = scores_of(queries, keys, positions, tokens, present, scale, softcap, S, MASKED)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(row_max - base)
        if S.values_in_keys:
            values = keys[0]
        else:
            places = value_offset + tokens % BLOCK * VALUE_DIM
            pointers = tl.multiple_of(begins + places, 16)
            values = load_rows(pointers, present, 0, VALUE_DIM, VALUE_PAD, MASKED)
        row_max = new_max
        row_sum = row_sum * kept + tl.sum(weights, 1)
        sums = tl.dot(weights.to(dtype), values, sums * kept[:, None], input_precision="ieee")
    return row_max, row_sum, sums


@triton.jit
def weighted(row_sum, sums):
    """The attention of rows [rows, value_pad] in fp32: zeros where a row saw nothing."""
    return sums / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
