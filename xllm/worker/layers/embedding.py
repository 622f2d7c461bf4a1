"""The table of token vectors, gathered by rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Embedding:
    """`weight` [vocab, hidden], possibly mapped from its file and of the file's type: what is
    gathered is rounded to `dtype`."""

    __slots__ = ("dtype", "weight")

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def read_from(self, weight: torch.Tensor) -> None:
        """Gather from this table from now on."""
        self.weight = weight

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows] to [rows, hidden]."""
        return F.embedding(token_ids, self.weight).to(self.dtype)
