"""Heads as a step's draws use them: a model's own, and that of ranks which have some rows of the
vocabulary each.

The head is applied once to all rows that are drawn from; who needs logits asks for the whole
vocabulary's, who needs the best token alone for that. Ranks exchange a row's logits for the first
and a number and an id for the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from xllm.worker.collectives.ranks import Ranks
from xllm.worker.sampling.greedy import BestTokens


class Head(Protocol):
    """Fp32 logits of rows of the last layer's output [rows, hidden]."""

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is here of the logits [rows, vocab or fewer], for the two below."""

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The logits [rows, vocab], contiguous, on every rank."""

    def best(self, part: torch.Tensor, find: BestTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """What `find` would give of the whole, on every rank."""


class ModelHead:
    """The head of a model that one rank computes."""

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._head = head

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return self._head(hidden)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return part

    def best(self, part: torch.Tensor, find: BestTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """See Head."""
        return find(part)


class RankHead:
    """`head` gives this rank's logits [rows, at most `rows_each`]; all ranks get the same bits, so
    that they draw the same tokens."""

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        ranks: Ranks,
        rows_each: int,
        vocab_size: int,
    ) -> None:
        self._head = head
        self._ranks = ranks
        self._rows_each = rows_each
        self._vocab_size = vocab_size

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return self._head(hidden)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """See Head."""
        missing = self._rows_each - part.shape[1]
        parts = self._ranks.gather(F.pad(part, (0, missing)) if missing else part)
        logits = parts.transpose(0, 1).reshape(len(part), -1)
        return logits[:, : self._vocab_size].contiguous()

    def best(self, part: torch.Tensor, find: BestTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """See Head. Of equal maxima the first rank's, which has the lower ids."""
        tops, ids = find(part)
        ids = ids + self._ranks.rank * self._rows_each
        # Both are exact in fp64, and go in one exchange.
        found = self._ranks.gather(torch.stack((tops.double(), ids.double())))
        top, first = found[:, 0].max(dim=0)
        return top.float(), found[:, 1].gather(0, first[None])[0].long()
