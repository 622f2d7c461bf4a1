"""Which tokens a row may draw: top-k, then top-p over what is left, then min-p; ties by id.

Sorted by falling logit and, among equals, rising id, what each of the three keeps is a beginning
of the row; so their intersection is one too. A window of the best K is looked at first and a
wider one only where the border is not clear inside it: the whole row is hardly ever sorted.
Invariant: the result does not depend on K, on the other rows, or on the order that topk gives ties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from xllm.protocol.sampling import SamplingParams

MIN_TEMPERATURE = 1e-30
"""Below, float32 quotients would be 0 / 0: it is arg-max by far already."""
FIRST_WINDOW = 256
SECOND_WINDOW = 4096
FLAT_VOCAB = 1 << 14
"""From this size on a row without top-k that the first window does not hold is not sorted: see
`nucleus`."""
_NEIGHBOURS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """What some rows may draw, K of them: as many as the row with the most.

    ids: int64 [rows, K]; tempered: float64 [rows, K], (logit - best) / temperature;
    keep: bool [rows, K]; clear: bool [rows], whether the border lies inside the window (what
    there is of a row where it does not is of no use)."""

    ids: torch.Tensor
    tempered: torch.Tensor
    keep: torch.Tensor
    clear: torch.Tensor


def temperature_of(params: SamplingParams) -> float:
    """The temperature to divide by."""
    return max(params.temperature, MIN_TEMPERATURE)


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a filter can drop any token."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


def window_sizes(params: Sequence[SamplingParams], vocab_size: int) -> list[int]:
    """The windows to try, ascending; the last is the whole vocabulary."""
    # One more than top-k, so that a tie at its border is seen.
    largest = max((p.top_k + 1 for p in params if 0 < p.top_k < vocab_size), default=0)
    wanted = (max(FIRST_WINDOW, largest), max(SECOND_WINDOW, largest))
    return [*sorted({size for size in wanted if size < vocab_size // 2}), vocab_size]


def find_candidates(
    logits: torch.Tensor, top: torch.Tensor, params: Sequence[SamplingParams], window: int
) -> Candidates:
    """Candidates of `logits` [rows, vocab] whose row maxima are `top` [rows]."""
    vocab_size = logits.shape[1]
    values, ids = sorted_head(logits, window)
    device = logits.device
    double = torch.float64
    heat = torch.tensor([temperature_of(p) for p in params], dtype=double, device=device)
    limit = torch.tensor(
        [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device=device
    )
    top_p = torch.tensor(
        [p.top_p if p.top_p < 1.0 else math.inf for p in params], dtype=double, device=device
    )
    floor = torch.tensor(
        [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params],
        dtype=double,
        device=device,
    )
    tempered = (values.to(double) - top.to(double)[:, None]) / heat[:, None]
    keep = torch.arange(window, device=device) < limit[:, None]
    weight = tempered.exp().masked_fill_(~keep, 0.0)
    mass = weight.sum(dim=1)
    if any(p.top_p < 1.0 for p in params):
        # Without top-k the mass is that of the whole row, which a window does not hold.
        cold = ((logits - top[:, None]) / heat[:, None].to(logits.dtype)).exp_()
        mass = torch.where(limit < vocab_size, mass, _row_sums(cold))
    before = weight.cumsum(dim=1) - weight
    keep &= before < (top_p * mass)[:, None]
    keep &= tempered >= floor[:, None]
    keep[:, 0] = True
    count = keep.sum(dim=1)
    last = values.gather(1, (count - 1)[:, None])[:, 0]
    clear = last > values[:, -1] if window < vocab_size else torch.ones_like(keep[:, 0])
    width = max(int(count.masked_fill_(~clear, 0).max().item()), 1)
    return Candidates(ids[:, :width], tempered[:, :width], keep[:, :width], clear)


def _row_sums(numbers: torch.Tensor) -> torch.Tensor:
    """float64 sums of the rows of float32 `numbers`: in float32 over a few neighbours, which is
    several times as fast and as exact as the numbers are, in float64 over the groups."""
    count = numbers.shape[1] // _NEIGHBOURS
    whole = count * _NEIGHBOURS
    groups = numbers[:, :whole].view(numbers.shape[0], count, _NEIGHBOURS).sum(dim=2)
    total: torch.Tensor = groups.sum(dim=1, dtype=torch.float64)
    return total.add_(numbers[:, whole:].sum(dim=1))


def sorted_head(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, falling, equals by rising id: (values, ids).

    Which of several equal values at the end of the window are in it is not defined."""
    if count >= logits.shape[1]:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values, ids
    values, ids = logits.topk(count, dim=1)
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)
