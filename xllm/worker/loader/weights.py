"""Where a model's weights go, and filling them from a checkpoint.

A model allocates its (fused) weights and binds each checkpoint name to the targets that it fills.
Names and shapes are checked for all tensors before the first byte is read; each source tensor is
dropped as soon as it is copied or packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from xllm.errors import ConfigError
from xllm.worker.kernels.experts import ExpertSizes, PackedExperts
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.kernels.packing import BLOCK, num_blocks
from xllm.worker.kernels.selection import choose_kind
from xllm.worker.kernels.team import Team
from xllm.worker.layers.embedding import Embedding
from xllm.worker.layers.linear import Linear
from xllm.worker.loader.checkpoint import Checkpoint
from xllm.worker.loader.shards import ShardPlan
from xllm.worker.loader.targets import (
    BiasTarget,
    CopyTarget,
    CutTarget,
    JoinedTargets,
    KeepTarget,
    PackTarget,
    WeightTarget,
    ZeroTarget,
)
from xllm.worker.platform.back_end_ops import BackEndOps

_SHOWN = 5


class WeightTable:
    """The weights of a model under construction: allocates them, and knows which tensor of the
    checkpoint fills which part. With a `team` linear maps are packed for the kernels as their
    tensors come, and embeddings stay in their file. `quantization`: see ModelSettings; it needs
    a team."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        team: Team | None = None,
        quantization: str = "none",
        shards: ShardPlan | None = None,
        ops: BackEndOps | None = None,
    ) -> None:
        """`shards`: which rank of the model this is. What is asked for are then its parts, and
        they are filled by parts of the checkpoint's tensors. `ops`: what the layers compute with
        beside torch, where the device has that."""
        self._shards = shards
        self.dtype = dtype
        self.device = device
        self.team = team
        self.ops = ops
        self.quantization = quantization
        self.targets: dict[str, list[WeightTarget]] = {}
        self.num_bytes = 0
        """Of all weights, but for what stays in its file."""

    def one(self, name: str, *shape: int) -> torch.Tensor:
        """A weight that one tensor fills."""
        return self.stacked([name], [shape[0]], *shape[1:])

    def stacked(self, names: Sequence[str], rows: Sequence[int], *rest: int) -> torch.Tensor:
        """A weight [sum(rows), *rest] that several tensors fill, one below the other."""
        weight = self._allocate((sum(rows), *rest))
        for name, part in zip(names, torch.split(weight, list(rows)), strict=True):
            self.bind(name, CopyTarget(part))
        return weight

    def grouped(
        self, groups: Sequence[str], names: Sequence[str], rows: int, columns: int, num_spare: int
    ) -> torch.Tensor:
        """A weight [groups + num_spare, names * rows, columns]: each group's part is filled by
        the tensors `group.name`, one below the other; the spare parts are left as they are."""
        weight = self._allocate((len(groups) + num_spare, len(names) * rows, columns))
        for group, whole in zip(groups, weight, strict=False):
            for name, part in zip(names, whole.split(rows), strict=True):
                self.bind(f"{group}.{name}", CopyTarget(part))
        return weight

    def experts(
        self,
        router: str,
        groups: Sequence[str],
        sizes: ExpertSizes,
        slots: torch.Tensor,
        counts: torch.Tensor,
    ) -> PackedExperts:
        """Experts packed for the kernels, which a team must be there for: expert i is filled by
        the maps `groups[i].gate_proj`, `.up_proj` and `.down_proj`, and lies in slot i."""
        assert self.team is not None
        kind = choose_kind(self.quantization, self.dtype, is_head=False)
        plain = choose_kind("none", self.dtype, is_head=False)
        experts = PackedExperts(kind, plain, sizes, slots, counts, self.team)
        self.bind(router, PackTarget(experts.router, sizes.num_experts, 0, 1))
        for slot, group in enumerate(groups):
            first = 2 * slot * experts.inner_blocks
            for name, block in (("gate_proj", first), ("up_proj", first + 1)):
                target = PackTarget(experts.gate_up, sizes.inner, block, 2)
                self.bind(f"{group}.{name}.weight", target)
            target = PackTarget(experts.down, sizes.hidden, slot * experts.hidden_blocks, 1)
            self.bind(f"{group}.down_proj.weight", target)
        self.num_bytes += experts.num_bytes
        return experts

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        gated: bool = False,
        is_head: bool = False,
    ) -> Linear | PackedLinear:
        """A linear map of `columns` inputs whose outputs the maps `names` give, rows[i] each, one
        below the other. `gated`: they are gate and up, of the same size, and the packed form
        gives silu(gate) * up. `is_head`: the outputs are logits."""
        weights, biases = [f"{n}.weight" for n in names], [f"{n}.bias" for n in names]
        if self.team is None:
            weight = self.stacked(weights, rows, columns)
            return Linear(weight, self.stacked(biases, rows) if bias else None)
        kind = choose_kind(self.quantization, self.dtype, is_head=is_head)
        linear = PackedLinear(kind, sum(rows), columns, self.team, gated=gated)
        self._bind_packed(linear, weights, list(rows), bias=False)
        if bias:
            self._bind_packed(linear, biases, list(rows), bias=True)
        self.num_bytes += linear.num_bytes
        return linear

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        """A table of `rows` vectors."""
        if self.team is None:
            return Embedding(self.one(name, rows, columns), self.dtype)
        embedding = Embedding(torch.empty((0, columns)), self.dtype)
        self.bind(name, KeepTarget((rows, columns), embedding.read_from))
        return embedding

    def bind(self, name: str, target: WeightTarget) -> None:
        """Have the checkpoint's tensor `name`, or this rank's part of it, fill a target; it may
        fill several."""
        if self._shards is not None:
            cut = self._shards.cut(name)
            if cut is not None:
                target = CutTarget(target, cut)
            elif self._shards.is_left_out(name):
                target = ZeroTarget(target)
        self.targets.setdefault(name, []).append(target)

    def take_from(self, name: str, other: str) -> None:
        """Have the tensor `other` fill what is bound to `name`, too."""
        self.targets.setdefault(other, []).extend(self.targets.pop(name))

    def num_head_rows(self, vocab_size: int) -> int:
        """Rows of the head that are here."""
        return vocab_size if self._shards is None else self._shards.head().count

    def head_rows(self, embedding: torch.Tensor) -> torch.Tensor:
        """Those rows of a table that is head and embedding in one."""
        return embedding if self._shards is None else embedding[self._shards.head().slices]

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.num_bytes += weight.numel() * weight.element_size()
        return weight

    def _bind_packed(
        self, linear: PackedLinear, names: list[str], rows: list[int], *, bias: bool
    ) -> None:
        kind = BiasTarget if bias else PackTarget
        if linear.gated or not any(count % BLOCK for count in rows[:-1]):
            stride = len(rows) if linear.gated else 1
            first = 0
            for number, (name, count) in enumerate(zip(names, rows, strict=True)):
                self.bind(name, kind(linear, count, number if linear.gated else first, stride))
                first += num_blocks(count)
            return
        whole = kind(linear, sum(rows), 0, 1)
        joined = JoinedTargets(rows, whole.shape[1:], self.dtype, whole.fill)
        for name, target in zip(names, joined.targets(), strict=True):
            self.bind(name, target)


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
        for target in table.targets.get(entry.name, ()):
            target.fill(source)
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
    for name, wanted in ((n, target.shape) for n, found in targets.items() for target in found):
        shape = entries[name].shape
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
