"""Drawing with top-k, top-p and min-p: of a row's list of candidates, or of the row where there is
none.

What filters keep is a beginning of the tokens by falling logit, equals by rising id: a border is a
logit and how many of its equals are kept. Top-k's border is found by bisection over the floats.
Top-p's never is: the best score of what is left is asked whether the mass before its token is less
than p of all. If it is not, the border is above that token, and the best of what is before it is
asked. That leaves the token that a sort would have given; with p of the mass kept the first answer
is right in a share p of all draws, and each that is wrong halves what is left, more or less.

Masses of lists are sums of fp64 weights, those of whole rows of fp32 ones, in fp64. As in
`sampling.candidates` a mass before a token that equals p of all to seven digits may fall on either
side of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.triton_kernels.draw import (
    best_drawn,
    double_of_row,
    exact_score,
    keys_of_row,
)
from xllm.worker.triton_kernels.draw_rows import FILTERED, ROW_NUMBERS
from xllm.worker.triton_kernels.draw_scratch import DrawScratch
from xllm.worker.triton_kernels.narrowing import weight_of

BLOCK = 2048
"""Tokens that a program looks at in one go: lists hardly ever have more."""

_WIDTH = tl.constexpr(ROW_NUMBERS)
_FILTERED = tl.constexpr(FILTERED)
_NO_ID = tl.constexpr(2**31 - 1)
_SIGN_FREE = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _load_block(values, tokens, start, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Logits [BLOCK] from `start` on, minus infinity behind the end, and their tokens."""
    places = start + tl.arange(0, BLOCK)
    inside = places < count
    x = tl.load(values + places, mask=inside, other=float("-inf")).to(tl.float32)
    ids = places
    if not WHOLE:
        ids = tl.load(tokens + places, mask=inside, other=_NO_ID)
    return x, ids


@triton.jit
def _weights(x, top, heat, WHOLE: tl.constexpr):
    """fp64 weights of logits; of whole rows good to fp32."""
    if WHOLE:
        return weight_of(x, top, heat).to(tl.float64)
    return tl.exp((x.to(tl.float64) - top.to(tl.float64)) / heat)


@triton.jit
def _order_of(x):
    """An int64 that grows with the float."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _SIGN_FREE, bits).to(tl.int64)


@triton.jit
def _float_of(order):
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ _SIGN_FREE, bits).to(tl.float32, bitcast=True)


@triton.jit
def _lowest(values, tokens, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest logit above minus infinity."""
    low = tl.full([], float("inf"), tl.float32)
    start = count * 0
    while start < count:
        x, _ = _load_block(values, tokens, start, count, WHOLE, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(x > float("-inf"), x, _INF)))
        start += BLOCK
    return low


@triton.jit
def _count_from(values, tokens, count, bound, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits are at least `bound`."""
    found = count * 0
    start = count * 0
    while start < count:
        x, _ = _load_block(values, tokens, start, count, WHOLE, BLOCK)
        found += tl.sum((x >= bound).to(tl.int32))
        start += BLOCK
    return found


@triton.jit
def _border_of_best(values, tokens, count, top, top_k, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The border of the `top_k` best: the largest float that `top_k` logits reach, or one between
    the last of them and the next."""
    low = _order_of(_lowest(values, tokens, count, WHOLE, BLOCK))
    high = _order_of(top)
    while low < high:
        middle = low + (high - low + 1) // 2
        found = _count_from(values, tokens, count, _float_of(middle), WHOLE, BLOCK)
        low = tl.where(found >= top_k, middle, low)
        high = tl.where(found == top_k, middle, tl.where(found > top_k, high, middle - 1))
    return _float_of(low)


@triton.jit
def _before(
    values, tokens, count, top, heat, value, token, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """(mass of the larger logits, number of them, number of equals with lower ids) of a token."""
    mass = tl.full([], 0.0, tl.float64)
    ahead = count * 0
    equals = count * 0
    start = count * 0
    while start < count:
        x, ids = _load_block(values, tokens, start, count, WHOLE, BLOCK)
        larger = x > value
        mass += tl.sum(tl.where(larger, _weights(x, top, heat, WHOLE), 0.0))
        ahead += tl.sum(larger.to(tl.int32))
        equals += tl.sum(((x == value) & (ids < token)).to(tl.int32))
        start += BLOCK
    return mass, ahead, equals


@triton.jit
def _best_within(
    values, tokens, count, top, heat, log_min_p, key0, key1, border, equals,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(token, its logit) of the best score above `border` or of the first `equals` on it."""
    best = tl.full([], float("-inf"), tl.float64)
    token = count * 0
    value = top
    seen = count * 0
    start = count * 0
    while start < count:
        x, ids = _load_block(values, tokens, start, count, WHOLE, BLOCK)
        on_border = (x == border).to(tl.int32)
        rank = seen + tl.cumsum(on_border, 0) - 1
        keep = (x > border) | ((on_border > 0) & (rank < equals))
        keep &= (x.to(tl.float64) - top.to(tl.float64)) / heat >= log_min_p
        kept = tl.where(keep, x, float("-inf"))
        pick, logit = best_drawn(kept, ids, top, heat, key0, key1)
        score = exact_score(logit, pick, top, heat, key0, key1)
        token = tl.where(score > best, pick, token)
        value = tl.where(score > best, logit, value)
        best = tl.maximum(best, score)
        seen += tl.sum(on_border)
        start += BLOCK
    return token, value


@triton.jit
def _draw(values, tokens, count, numbers, row, top, mass, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The token of a row whose candidates are `values`, `count` of them by rising id; `mass` is
    that of the whole row."""
    heat = double_of_row(numbers, row, 3)
    top_k = tl.load(numbers + row * _WIDTH + 4)
    top_p = double_of_row(numbers, row, 5)
    log_min_p = double_of_row(numbers, row, 6)
    key0, key1 = keys_of_row(numbers, row)
    border = tl.full([], float("-inf"), tl.float32)
    equals = count * 0
    if top_k > 0:
        border = _border_of_best(values, tokens, count, top, top_k, WHOLE, BLOCK)
        mass, ahead, on_border = _before(
            values, tokens, count, top, heat, border, _NO_ID, WHOLE, BLOCK
        )
        equals = tl.minimum(on_border, (top_k - ahead).to(tl.int32))
        mass += equals * _weights(border, top, heat, WHOLE)
    token, value = _best_within(
        values, tokens, count, top, heat, log_min_p, key0, key1, border, equals, WHOLE, BLOCK
    )
    asked = top_p < 1.0
    while asked:
        before, ahead, lower = _before(values, tokens, count, top, heat, value, token, WHOLE, BLOCK)
        before += lower * _weights(value, top, heat, WHOLE)
        asked = (before >= top_p * mass) & (ahead + lower > 0)
        if asked:
            token, value = _best_within(
                values, tokens, count, top, heat, log_min_p, key0, key1, value, lower,
                WHOLE, BLOCK,
            )  # fmt: skip
    return token


@triton.jit
def _draw_filtered(
    logits, row_stride, numbers, tops, totals, lengths, values, tokens, out_tokens,
    VOCAB: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row with filters, unless its logits are not finite."""
    row = tl.program_id(0)
    top = tl.load(tops + row)
    if (tl.load(numbers + row * _WIDTH) != _FILTERED) | (top != top):
        return
    mass = tl.load(totals + row)
    length = tl.load(lengths + row)
    if length >= 0:
        token = _draw(
            values + row * ROOM, tokens + row * ROOM, length, numbers, row, top, mass,
            False, BLOCK,
        )  # fmt: skip
    else:
        source = logits + row.to(tl.int64) * row_stride
        token = _draw(source, tokens, length * 0 + VOCAB, numbers, row, top, mass, True, BLOCK)
    tl.store(out_tokens + row, token.to(tl.int64))


def draw_filtered(
    logits: torch.Tensor, numbers: torch.Tensor, scratch: DrawScratch, out_tokens: torch.Tensor
) -> None:
    """Launch the draws of the filtered rows of `logits` [rows, vocab], behind `gather_chunks`.
    Their tokens go to `out_tokens` int64 [rows]; rows that are not finite keep theirs."""
    _draw_filtered[(logits.shape[0],)](
        logits, logits.stride(0), numbers, scratch.tops, scratch.totals, scratch.lengths,
        scratch.values, scratch.ids, out_tokens, VOCAB=scratch.vocab_size, ROOM=scratch.room,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
