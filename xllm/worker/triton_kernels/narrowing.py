"""Narrowing a filtered row down to the tokens that its filters can keep, without sorting it.

Filters keep a beginning of the row sorted by falling logit. A ladder of thresholds below the
row's largest logit is laid, and each chunk counts and weighs what lies above each; the highest
threshold that surely has all of what is kept above it is taken, and what it lets through is
written to a list, in the order of ids. Sums are made in a fixed order, places follow from counts,
so that nothing depends on which program runs first. The last rung lets all through: its mass is
the row's, and what is too long for a list is drawn from the row itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xllm.worker.triton_kernels.draw import double_of_row
from xllm.worker.triton_kernels.draw_rows import FILTERED, ROW_NUMBERS
from xllm.worker.triton_kernels.draw_scratch import RUNGS, DrawScratch

TILE = 512
"""Logits that a program weighs at a time: with a counter for each at every rung."""

_WIDTH = tl.constexpr(ROW_NUMBERS)
_FILTERED = tl.constexpr(FILTERED)
_RUNGS = tl.constexpr(RUNGS)
_LAST = tl.constexpr(RUNGS - 1)
_COLDEST = tl.constexpr(-1e8)
_SLACK = tl.constexpr(1e-6)
"""What fp32 masses may be off by, as a part of the row's."""


@triton.jit
def weight_of(x, top, heat):
    """fp32 weights of logits, 1 for the largest."""
    return tl.exp(tl.maximum(x - top, _COLDEST) / heat.to(tl.float32))


@triton.jit
def thresholds_of(numbers, depths, row, top):
    """fp32 thresholds [RUNGS] of a row, falling, the last minus infinity."""
    heat = double_of_row(numbers, row, 3).to(tl.float32)
    counted = tl.load(numbers + row * _WIDTH + 4) > 0
    unit = tl.where(counted, 1.0, heat)
    return top - tl.load(depths + tl.arange(0, _RUNGS)) * unit


@triton.jit
def _weigh_chunk(
    logits, row_stride, numbers, tops, depths, thresholds, counts, masses,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Counts and masses of what a chunk has at each rung or above it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    top = tl.load(tops + row)
    if (tl.load(numbers + row * _WIDTH) != _FILTERED) | (top != top):
        return
    heat = double_of_row(numbers, row, 3)
    rungs = tl.arange(0, _RUNGS)
    bounds = thresholds_of(numbers, depths, row, top)
    if chunk == 0:
        # Whoever gathers compares with these very numbers, however sums are fused.
        tl.store(thresholds + row * _RUNGS + rungs, bounds)
    count = tl.zeros([_RUNGS, TILE], tl.int32)
    mass = tl.zeros([_RUNGS, TILE], tl.float32)
    for start in range(0, CHUNK, TILE):
        ids = chunk * CHUNK + start + tl.arange(0, TILE)
        places = logits + row.to(tl.int64) * row_stride + ids
        x = tl.load(places, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        above = (x[None, :] >= bounds[:, None]) & (x > float("-inf"))[None, :]
        count += above.to(tl.int32)
        mass += tl.where(above, weight_of(x, top, heat)[None, :], 0.0)
    place = (row * CHUNKS + chunk) * _RUNGS + rungs
    tl.store(counts + place, tl.sum(count, 1))
    tl.store(masses + place, tl.sum(mass, 1))


@triton.jit
def _holds_all(numbers, row, top, bounds, counts, masses, mass):
    """bool [RUNGS]: at which rungs all that the row's filters keep, and what they need to know,
    is above. `counts` and `masses` [RUNGS], `mass`: the row's."""
    top_k = tl.load(numbers + row * _WIDTH + 4)
    top_p = double_of_row(numbers, row, 5)
    least = top.to(tl.float64) + double_of_row(numbers, row, 3) * double_of_row(numbers, row, 6)
    enough = tl.arange(0, _RUNGS) == _LAST
    enough |= (top_k > 0) & (counts >= top_k)
    enough |= (top_k == 0) & (top_p < 1.0) & (masses >= (top_p + _SLACK) * mass)
    # Behind top-k, top-p counts from the mass of all of the k best, whatever min-p leaves.
    return enough | ((top_k == 0) | (top_p >= 1.0)) & (bounds.to(tl.float64) <= least)


@triton.jit
def _gather_chunk(
    logits, row_stride, numbers, tops, thresholds, counts, masses, values, tokens, totals,
    lengths,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """A chunk's part of the row's list, at the place that the counts of those before it give; the
    first chunk says how long the list is (-1: there is none, it would not fit)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    top = tl.load(tops + row)
    if (tl.load(numbers + row * _WIDTH) != _FILTERED) | (top != top):
        return
    rungs, chunks = tl.arange(0, _RUNGS), tl.arange(0, PADDED)
    places = (row * CHUNKS + chunks[:, None]) * _RUNGS + rungs[None, :]
    inside = (chunks < CHUNKS)[:, None]
    all_counts = tl.load(counts + places, mask=inside, other=0)
    parts = tl.load(masses + places, mask=inside, other=0.0).to(tl.float64)
    bounds = tl.load(thresholds + row * _RUNGS + rungs)
    sums, weights = tl.sum(all_counts, 0), tl.sum(parts, 0)
    mass = tl.sum(tl.where(rungs == _LAST, weights, 0.0))
    enough = _holds_all(numbers, row, top, bounds, sums, weights, mass)
    rung = tl.min(tl.where(enough, rungs, _LAST))
    length = tl.sum(tl.where(rungs == rung, sums, 0))
    if chunk == 0:
        tl.store(totals + row, mass)
        tl.store(lengths + row, tl.where(length > ROOM, -1, length))
    taken = tl.where(rungs[None, :] == rung, all_counts, 0)
    own = tl.sum(tl.sum(tl.where(chunks[:, None] == chunk, taken, 0), 1))
    if (length > ROOM) | (own == 0):
        return
    first = tl.sum(tl.sum(tl.where(chunks[:, None] < chunk, taken, 0), 1))
    bound = tl.max(tl.where(rungs == rung, bounds, float("-inf")))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    source = logits + row.to(tl.int64) * row_stride + ids
    x = tl.load(source, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    above = (x >= bound) & (x > float("-inf"))
    place = row * ROOM + first + tl.cumsum(above.to(tl.int32), 0) - 1
    tl.store(values + place, x, mask=above)
    tl.store(tokens + place, ids, mask=above)


def weigh_chunks(logits: torch.Tensor, numbers: torch.Tensor, scratch: DrawScratch) -> None:
    """Launch the weighing of all chunks of the filtered rows of `logits` [rows, vocab], whose
    largest are known."""
    _weigh_chunk[(logits.shape[0], scratch.chunks)](
        logits, logits.stride(0), numbers, scratch.tops, scratch.depths, scratch.thresholds,
        scratch.counts, scratch.masses, VOCAB=scratch.vocab_size, CHUNKS=scratch.chunks,
        CHUNK=scratch.chunk, TILE=min(scratch.chunk, TILE), num_warps=4,
    )  # fmt: skip


def gather_chunks(logits: torch.Tensor, numbers: torch.Tensor, scratch: DrawScratch) -> None:
    """Launch the gathering of lists, behind `weigh_chunks`."""
    _gather_chunk[(logits.shape[0], scratch.chunks)](
        logits, logits.stride(0), numbers, scratch.tops, scratch.thresholds, scratch.counts,
        scratch.masses, scratch.values, scratch.ids, scratch.totals, scratch.lengths,
        VOCAB=scratch.vocab_size, CHUNKS=scratch.chunks,
        PADDED=triton.next_power_of_2(scratch.chunks), CHUNK=scratch.chunk, ROOM=scratch.room,
        num_warps=4,
    )  # fmt: skip
