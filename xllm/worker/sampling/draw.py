"""Drawing: the arg-max of tempered logits plus Gumbel noise, ties to the lower id.

Whole vocabularies are scored in float32, whose last bits may depend on how a kernel splits its
work. Where two scores come within MARGIN of each other, those few are scored again by the
definition in `noise`, in double precision: the token is a function of its row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xllm.worker.sampling.candidates import Candidates
from xllm.worker.sampling.noise import draw_keys, gumbel, token_bits
from xllm.worker.sampling.noise_tensor import (
    DrawKey,
    draw_keys_tensor,
    exponential_log,
    token_bits_tensor,
)

MARGIN = 1e-4
"""Far above float32's error in a winning score (some 1e-5), far below their usual distance."""


def draw_plain(
    logits: torch.Tensor,
    top: torch.Tensor,
    temperatures: torch.Tensor,
    draws: Sequence[DrawKey],
    all_ids: torch.Tensor,
) -> list[int]:
    """One token of each row of `logits` [draws, vocab]. `top` (row maxima) and `temperatures`
    (float64) [draws]; `all_ids`: int32 0 to vocab - 1."""
    bits = token_bits_tensor(draw_keys_tensor(draws, logits.device), all_ids)
    scores = (logits - top[:, None]).div_(temperatures[:, None].to(logits.dtype))
    scores.sub_(exponential_log(bits, logits.dtype))

    def exact(draw: int, token: int, column: int) -> float:
        cold = (logits[draw, column].item() - top[draw].item()) / temperatures[draw].item()
        return cold + gumbel(token_bits(draw_keys(*draws[draw]), token))

    return _choose(scores, None, exact)


def draw_filtered(
    found: Candidates, row_of_draw: Sequence[int], draws: Sequence[DrawKey]
) -> list[int]:
    """One token a draw, of the candidates of row `row_of_draw[i]`."""
    rows = torch.tensor(row_of_draw, device=found.ids.device)
    ids = found.ids[rows]
    tempered = found.tempered[rows]
    bits = token_bits_tensor(draw_keys_tensor(draws, ids.device), ids.to(torch.int32))
    scores = tempered - exponential_log(bits, torch.float64)
    scores.masked_fill_(~found.keep[rows], -torch.inf)

    def exact(draw: int, token: int, column: int) -> float:
        noise = gumbel(token_bits(draw_keys(*draws[draw]), token))
        return float(tempered[draw, column].item()) + noise

    return _choose(scores, ids, exact)


def _choose(
    scores: torch.Tensor, ids: torch.Tensor | None, exact: Callable[[int, int, int], float]
) -> list[int]:
    """The token of each row's best column (`ids` of columns; None: themselves); near ties by
    `exact(row, token, column)`, then by id."""
    best, columns = scores.max(dim=1)
    near = scores >= (best - MARGIN)[:, None]
    winners = columns if ids is None else ids.gather(1, columns[:, None])[:, 0]
    tokens: list[int] = winners.tolist()
    for draw in (near.sum(dim=1) > 1).nonzero()[:, 0].tolist():
        rivals: list[int] = near[draw].nonzero()[:, 0].tolist()
        names: list[int] = rivals if ids is None else ids[draw, rivals].tolist()
        tokens[draw] = min(
            (-exact(draw, token, column), token)
            for token, column in zip(names, rivals, strict=True)
        )[1]
    return tokens
