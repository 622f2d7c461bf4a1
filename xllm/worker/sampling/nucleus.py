"""What top-p and min-p keep of a wide flat row, found without sorting it.

Tokens are sorted into buckets by their tempered logit; the masses of the buckets tell in which one
the border lies, and only that one is sorted. A row's buckets are its own, so the result depends on
no other row. Invariant: it keeps what a sort of the whole row by falling logit, equals by rising
id, would keep.
"""

from __future__ import annotations

import math

import torch

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.candidates import Candidates, temperature_of

_NUM_BUCKETS = 1 << 13
_DEPTH = 40.0
"""Tempered logits below -40 share the last bucket: all of a vocabulary there weighs nothing."""


def find_nucleus(logits: torch.Tensor, top: float, params: SamplingParams) -> Candidates:
    """Candidates of one row of `logits` [vocab] whose maximum is `top` and that has no top-k."""
    tempered = (logits.double() - top) / temperature_of(params)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if params.top_p < 1.0:
        keep = _heaviest(logits, tempered, params.top_p)
    if params.min_p > 0.0:
        keep &= tempered >= math.log(params.min_p)
    keep[logits.argmax()] = True
    ids = keep.nonzero()[:, 0]
    found = tempered[ids]
    return Candidates(
        ids[None], found[None], torch.ones_like(ids, dtype=torch.bool)[None], keep.new_ones(1)
    )


def _heaviest(logits: torch.Tensor, tempered: torch.Tensor, top_p: float) -> torch.Tensor:
    """bool [vocab]: the smallest set of best tokens that reaches `top_p` of the mass."""
    weight = tempered.exp()
    scaled = (tempered * (-_NUM_BUCKETS / _DEPTH)).clamp_(max=_NUM_BUCKETS - 1)
    bucket = scaled.to(torch.int64)
    masses = torch.bincount(bucket, weights=weight, minlength=_NUM_BUCKETS)
    before = masses.cumsum(0) - masses
    limit = top_p * masses.sum()
    border = max(int((before < limit).sum().item()) - 1, 0)
    inside = (bucket == border).nonzero()[:, 0]
    # Ids rise in `inside`, and the sort is stable: equals stay in their order.
    inside = inside[logits[inside].sort(descending=True, stable=True).indices]
    own = weight[inside]
    keep = bucket < border
    keep[inside[before[border] + own.cumsum(0) - own < limit]] = True
    return keep
