"""Drawing without filters: the largest logit, or the largest of tempered logits plus noise.

A program looks at one chunk of one row and reads it once: within a chunk tempered logits count
from the chunk's own largest, so that no pass has to find the row's before. A second kernel
compares the chunks' winners, in fp64 and from the row's largest logit.

Scores are fp32. A chunk's tokens within MARGIN of its best are scored again in fp64 by the
definition in `sampling.noise`, and ties go to the lower id. So the token is that of
`sampling.draw` as long as fp32 scores are wrong by less than half of MARGIN where they can win
(they are by some 1e-5), and the device's fp64 logarithm gives the same for the same argument, and
no two tokens that differ in logit or noise come within its error of each other: at two units in
the last place that is once in some 1e13 draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.sampling.draw import MARGIN
from xllm.worker.triton_kernels.draw_rows import (
    ABSENT,
    FILTERED,
    FLAG_NOT_DRAWN,
    FLAG_NOT_FINITE,
    GREEDY,
    PLAIN,
    ROW_NUMBERS,
)
from xllm.worker.triton_kernels.draw_scratch import DrawScratch
from xllm.worker.triton_kernels.noise import bits_of, exact_gumbel_of, gumbel_of, keys_of

_WIDTH = tl.constexpr(ROW_NUMBERS)
_ABSENT = tl.constexpr(ABSENT)
_GREEDY = tl.constexpr(GREEDY)
_PLAIN = tl.constexpr(PLAIN)
_FILTERED = tl.constexpr(FILTERED)
_NOT_FINITE = tl.constexpr(FLAG_NOT_FINITE)
_NOT_DRAWN = tl.constexpr(FLAG_NOT_DRAWN)
_MARGIN = tl.constexpr(MARGIN)
_NO_ID = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))
_COLDEST = tl.constexpr(-1e8)
"""Logits so far below the best cannot be drawn at any temperature; farther ones would overflow."""


@triton.jit
def keys_of_row(numbers, row):
    """The key words of a row's draw."""
    line = numbers + row * _WIDTH
    return keys_of(tl.load(line + 1), tl.load(line + 2))


@triton.jit
def double_of_row(numbers, row, column):
    """A double among a row's numbers."""
    return tl.load(numbers + row * _WIDTH + column).to(tl.float64, bitcast=True)


@triton.jit
def exact_score(value, token, base, heat, key0, key1):
    """fp64 score of a token with logit `value`, by the definition."""
    cold = (value.to(tl.float64) - base.to(tl.float64)) / heat
    return cold + exact_gumbel_of(bits_of(key0, key1, token))


@triton.jit
def _settle(x, ids, near, base, heat, key0, key1):
    """The best of the tokens that are `near`, one after the other by rising id."""
    best = tl.full([], float("-inf"), tl.float64)
    pick = tl.min(ids)
    left = near
    count = tl.sum(near.to(tl.int32))
    while count > 0:
        token = tl.min(tl.where(left, ids, _NO_ID))
        value = tl.max(tl.where(ids == token, x, float("-inf")))
        score = exact_score(value, token, base, heat, key0, key1)
        pick = tl.where(score > best, token, pick)
        best = tl.maximum(best, score)
        left = left & (ids != token)
        count -= 1
    return pick


@triton.jit
def best_drawn(x, ids, base, heat, key0, key1):
    """(token, its logit) of the best score among logits `x` [tokens] with distinct ascending
    `ids`; `base`, finite, is at least the largest. -inf is no candidate: where nothing else is,
    the first token is given."""
    cold = tl.maximum(x - base, _COLDEST) / heat.to(tl.float32)
    noisy = cold + gumbel_of(bits_of(key0, key1, ids))
    scores = tl.where(x > float("-inf"), noisy, float("-inf"))
    best = tl.max(scores)
    pick = tl.min(tl.where(scores == best, ids, _NO_ID))
    near = (scores >= best - _MARGIN) & (tl.abs(x) < _INF)
    if tl.sum(near.to(tl.int32)) > 1:
        pick = _settle(x, ids, near, base, heat, key0, key1)
    return pick, tl.max(tl.where(ids == pick, x, float("-inf")))


@triton.jit
def _search_chunk(
    logits, row_stride, numbers, maxima, values, tokens,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest logit of a chunk (NaN where it holds one), and its winner unless the row has
    filters."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    mode = tl.load(numbers + row * _WIDTH)
    if mode == _ABSENT:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    places = logits + row.to(tl.int64) * row_stride + ids
    x = tl.load(places, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    is_nan = x != x
    bad = tl.sum(is_nan.to(tl.int32)) > 0
    x = tl.where(is_nan, float("-inf"), x)
    top = tl.max(x)
    place = row * CHUNKS + chunk
    tl.store(maxima + place, tl.where(bad, float("nan"), top))
    if mode == _GREEDY:
        tl.store(tokens + place, tl.min(tl.where(x == top, ids, _NO_ID)))
        tl.store(values + place, top)
    elif mode == _PLAIN:
        key0, key1 = keys_of_row(numbers, row)
        heat = double_of_row(numbers, row, 3)
        base = tl.where(tl.abs(top) < _INF, top, 0.0)
        pick, value = best_drawn(x, ids, base, heat, key0, key1)
        tl.store(tokens + place, pick)
        tl.store(values + place, value)


@triton.jit
def _merge_chunks(
    numbers, maxima, values, tokens, tops, out_tokens, out_flags,
    CHUNKS: tl.constexpr, PADDED: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """A row's largest logit (NaN: not finite), flag and, unless it has filters, its token."""
    row = tl.program_id(0)
    mode = tl.load(numbers + row * _WIDTH)
    if mode == _ABSENT:
        return
    chunks = tl.arange(0, PADDED)
    inside = chunks < CHUNKS
    parts = tl.load(maxima + row * CHUNKS + chunks, mask=inside, other=float("-inf"))
    is_nan = parts != parts
    top = tl.max(tl.where(is_nan, float("-inf"), parts))
    bad = (tl.sum(is_nan.to(tl.int32)) > 0) | (tl.abs(top) == _INF)
    tl.store(tops + row, tl.where(bad, float("nan"), top))
    undrawn = (mode == _FILTERED) & (not FILTERS)
    flag = tl.where(bad, _NOT_FINITE, tl.where(undrawn, _NOT_DRAWN, 0))
    tl.store(out_flags + row, flag.to(tl.uint8))
    if bad | (mode == _FILTERED):
        tl.store(out_tokens + row, tl.full([], 0, tl.int64))
        return
    found = tl.load(values + row * CHUNKS + chunks, mask=inside, other=float("-inf"))
    ids = tl.load(tokens + row * CHUNKS + chunks, mask=inside, other=_NO_ID)
    scores = found.to(tl.float64) - top.to(tl.float64)
    if mode == _PLAIN:
        key0, key1 = keys_of_row(numbers, row)
        heat = double_of_row(numbers, row, 3)
        scores = exact_score(found, ids, top, heat, key0, key1)
    best = tl.max(scores)
    pick = tl.min(tl.where(scores == best, ids, _NO_ID))
    tl.store(out_tokens + row, pick.to(tl.int64))


def search_chunks(logits: torch.Tensor, numbers: torch.Tensor, scratch: DrawScratch) -> None:
    """Launch the search of all chunks of `logits` [rows, vocab]. `numbers`: int64 [rows,
    ROW_NUMBERS]."""
    _search_chunk[(logits.shape[0], scratch.chunks)](
        logits, logits.stride(0), numbers, scratch.maxima, scratch.winners, scratch.winner_ids,
        VOCAB=scratch.vocab_size, CHUNKS=scratch.chunks, CHUNK=scratch.chunk, num_warps=4,
    )  # fmt: skip


def merge_chunks(
    numbers: torch.Tensor,
    scratch: DrawScratch,
    out_tokens: torch.Tensor,
    out_flags: torch.Tensor,
    *,
    filters: bool,
) -> None:
    """Launch the choice among the chunks' winners: `out_tokens` int64, `out_flags` uint8, both
    [rows]. `filters`: whether rows with filters are drawn afterwards."""
    _merge_chunks[(out_tokens.shape[0],)](
        numbers, scratch.maxima, scratch.winners, scratch.winner_ids, scratch.tops, out_tokens,
        out_flags, CHUNKS=scratch.chunks, PADDED=triton.next_power_of_2(scratch.chunks),
        FILTERS=filters, num_warps=4,
    )  # fmt: skip
