"""The head of a model whose ranks have some rows of the vocabulary each: logits of all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from xllm.worker.collectives.ranks import Ranks


class RankHead:
    """`head` gives this rank's logits [rows, at most `rows_each`]; the call those of the whole
    vocabulary, on every rank, so that all draw the same tokens."""

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

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output [rows, hidden] to fp32 logits [rows, vocab], contiguous."""
        part = self._head(hidden)
        missing = self._rows_each - part.shape[1]
        parts = self._ranks.gather(F.pad(part, (0, missing)) if missing else part)
        logits = parts.transpose(0, 1).reshape(len(hidden), -1)
        return logits[:, : self._vocab_size].contiguous()  # the sampler edits them in place
