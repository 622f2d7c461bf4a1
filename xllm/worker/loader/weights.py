"""Where a model's weights go, and filling them from a checkpoint.

A model allocates its (fused) weights and binds each checkpoint name to the view that it fills.
Names and shapes are checked for all tensors before the first byte is read; each source tensor is
dropped as soon as it is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from xllm.errors import ConfigError
from xllm.worker.loader.checkpoint import Checkpoint

_SHOWN = 5


class WeightTable:
    """The weights of a model under construction: allocates them, and knows which tensor of the
    checkpoint fills which part."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.targets: dict[str, torch.Tensor] = {}

    def one(self, name: str, *shape: int) -> torch.Tensor:
        """A weight that one tensor fills."""
        return self.stacked([name], [shape[0]], *shape[1:])

    def stacked(self, names: Sequence[str], rows: Sequence[int], *rest: int) -> torch.Tensor:
        """A weight [sum(rows), *rest] that several tensors fill, one below the other."""
        weight = torch.empty((sum(rows), *rest), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(weight, list(rows)), strict=True):
            self.targets[name] = part
        return weight

    def grouped(
        self, groups: Sequence[str], names: Sequence[str], rows: int, columns: int, num_spare: int
    ) -> torch.Tensor:
        """A weight [groups + num_spare, names * rows, columns]: each group's part is filled by
        the tensors `group.name`, one below the other; the spare parts are left as they are."""
        shape = (len(groups) + num_spare, len(names) * rows, columns)
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        for group, whole in zip(groups, weight, strict=False):
            for name, part in zip(names, whole.split(rows), strict=True):
                self.targets[f"{group}.{name}"] = part
        return weight

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(part.numel() * part.element_size() for part in self.targets.values())


def load_weights(
    checkpoint: Checkpoint,
    table: WeightTable,
    progress: Callable[[int, int], None],
    unused: Sequence[str] = (),
) -> None:
    """Fill every weight of the table; `progress(loaded, total)` counts the checkpoint's bytes.

    Raises ConfigError naming tensors that are missing, mis-shaped, or in the checkpoint without
    a use (but for those in `unused` and the rotary tables of old checkpoints).
    """
    _check_names(checkpoint, table, unused)
    total, loaded = checkpoint.total_bytes, 0
    progress(0, total)
    for entry, source in checkpoint.tensors():
        target = table.targets.get(entry.name)
        if target is not None:
            target.copy_(source)
        loaded += entry.num_bytes
        progress(loaded, total)


def _check_names(checkpoint: Checkpoint, table: WeightTable, unused: Sequence[str]) -> None:
    entries, targets = checkpoint.entries, table.targets
    missing = [name for name in targets if name not in entries]
    if missing:
        raise ConfigError(f"the checkpoint lacks {_listed(missing)}", param="model.path")
    unexpected = [
        name
        for name in entries
        if name not in targets and name not in unused and not name.endswith("rotary_emb.inv_freq")
    ]
    if unexpected:
        raise ConfigError(
            f"the checkpoint has tensors that this architecture does not use: "
            f"{_listed(unexpected)}",
            param="model.path",
        )
    for name, target in targets.items():
        shape, wanted = entries[name].shape, tuple(target.shape)
        if shape != wanted:
            raise ConfigError(
                f"{name} has shape {list(shape)} ({math.prod(shape)} numbers), "
                f"config.json asks for {list(wanted)}",
                param="model.path",
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    rest = len(names) - _SHOWN
    return shown if rest <= 0 else f"{shown} and {rest} more"
