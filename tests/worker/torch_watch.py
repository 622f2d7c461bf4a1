"""Watches what torch computes: how much between two ticks, and how large its tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TorchWatch(TorchDispatchMode):
    """Counts the numbers that operations give. `longest`: the most between two ticks, which
    stands for time; `largest`: bytes of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ticks = 0
        self.longest = 0
        self.largest = 0
        self._since = 0

    def tick(self) -> None:
        """A piece of work is done."""
        self.num_ticks += 1
        self._since = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._since += leaf.numel()
                fresh = not func.is_view and leaf.untyped_storage().nbytes() >= leaf.nbytes
                if fresh:
                    self.largest = max(self.largest, leaf.nbytes)
        self.longest = max(self.longest, self._since)
        return found
