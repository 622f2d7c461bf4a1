"""A linear map: x W^T + b, in the weights' type."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Linear:
    """weight [out, in], bias [out] or None."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out]."""
        return F.linear(x, self.weight, self.bias)
