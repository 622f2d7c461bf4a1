"""What a model's computation needs of the other ranks: sums and gathers.

Invariant: what ranks compute from a sum or a gather has the same bits on all of them, since every
rank adds the same parts in the same order; and the order is that of the ranks, whatever the shape,
so that a row's sum does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class PendingSum(Protocol):
    """A sum under way; the rank may compute meanwhile."""

    def wait(self) -> torch.Tensor:
        """The sum of all ranks' parts. Called once. Raises EngineError where a rank is gone or
        silent."""


class Ranks(Protocol):
    """The ranks of an instance, as one of them sees them. All ranks call the same methods in the
    same order with tensors of the same shape."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def agree(self, numbers: Sequence[int]) -> None:
        """Check that all ranks are about to do the same, as these numbers tell (as many on each).
        Raises EngineError where they are not: a sum of parts that differ in shape could not be
        told from a right one."""

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        """Begin the sum of every rank's part, of one shape. The part must not change until the
        sum is there."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's part, in their order: [size, *part.shape]."""


class OneRank:
    """A rank without others."""

    rank = 0
    size = 1

    def agree(self, numbers: Sequence[int]) -> None:
        """It does."""

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        """The part is the sum."""
        return FinishedSum(part)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[1, *part.shape]."""
        return part[None]


class FinishedSum:
    """A sum that is there."""

    __slots__ = ("_sum",)

    def __init__(self, sum_: torch.Tensor) -> None:
        self._sum = sum_

    def wait(self) -> torch.Tensor:
        """It."""
        return self._sum
