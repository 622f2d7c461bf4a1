"""The best token of each row, ties to the lower id.

A maximum alone is found at the speed of memory, one with its index is not: the maxima of groups of
columns are found first, and the index in the one group that has the row's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BestTokens = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(maxima, ids) of the rows of fp32 logits [rows, vocab], ties to the lower id; NaN for a row that
holds one."""

_GROUP = 512


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(maxima, int64 ids) of the rows of `logits` [rows, vocab]. A row that holds a NaN has it as
    its maximum, and an id of no meaning."""
    num_rows, vocab_size = logits.shape
    count = vocab_size // _GROUP
    if count < 2:
        return logits.max(dim=1)
    whole = count * _GROUP
    maxima = logits[:, :whole].view(num_rows, count, _GROUP).amax(dim=2)
    if whole < vocab_size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    top, group = maxima.max(dim=1)  # the first of equals
    # The last group may be short: it begins earlier then, among tokens that are below the maximum.
    first = (group * _GROUP).clamp_(max=vocab_size - _GROUP)
    columns = first[:, None] + torch.arange(_GROUP, device=logits.device)
    is_best = logits.gather(1, columns).eq_(top[:, None])
    return top, first + is_best.argmax(dim=1)
