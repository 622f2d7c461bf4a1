"""Where a checkpoint's tensors go: kinds of target, each of which takes one tensor.

A target knows the shape that it wants and takes its tensor once. What it does not keep it does
not hold on to: the loader drops the tensor afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from xllm.worker.kernels.linear import PackedLinear, Part
from xllm.worker.loader.shards import Cut


class WeightTarget(Protocol):
    """Takes one tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it wants."""

    def fill(self, source: torch.Tensor) -> None:
        """Take the tensor, which has that shape and any type that checkpoints have."""


class CopyTarget:
    """A view of a weight in its final place."""

    def __init__(self, part: torch.Tensor) -> None:
        self._part = part
        self.shape = tuple(part.shape)

    def fill(self, source: torch.Tensor) -> None:
        """Copy, with a change of type where they differ."""
        self._part.copy_(source)


class KeepTarget:
    """Keeps the tensor itself, which stays mapped from its file: for what is read by rows."""

    def __init__(self, shape: tuple[int, ...], keep: Callable[[torch.Tensor], None]) -> None:
        self.shape = shape
        self._keep = keep

    def fill(self, source: torch.Tensor) -> None:
        """Keep it."""
        self._keep(source)


class PackTarget:
    """Rows of a weight that are packed as they come, to blocks first, first + stride, ..."""

    def __init__(self, linear: PackedLinear, num_rows: int, first_block: int, stride: int) -> None:
        self._linear = linear
        self._first_block = first_block
        self._stride = stride
        self.shape: tuple[int, ...] = (num_rows, linear.num_inputs)

    def fill(self, source: torch.Tensor) -> None:
        """Pack it; nothing of the source is kept."""
        self._linear.place(Part(source, self._first_block, self._stride))


class BiasTarget:
    """Rows of a bias beside a PackTarget's rows."""

    def __init__(self, linear: PackedLinear, num_rows: int, first_block: int, stride: int) -> None:
        self._linear = linear
        self._first_block = first_block
        self._stride = stride
        self.shape: tuple[int, ...] = (num_rows,)

    def fill(self, source: torch.Tensor) -> None:
        """Place it."""
        self._linear.place_bias(source, self._first_block, self._stride)


class CutTarget:
    """A target that takes a part of its tensor; the rest is not read."""

    def __init__(self, target: WeightTarget, cut: Cut) -> None:
        self._target = target
        self._slices = cut.slices
        self.shape = cut.whole_shape(target.shape)

    def fill(self, source: torch.Tensor) -> None:
        """Take the part."""
        self._target.fill(source[self._slices])


class ZeroTarget:
    """A target that is filled with zeros in place of its tensor."""

    def __init__(self, target: WeightTarget) -> None:
        self._target = target
        self.shape = target.shape

    def fill(self, source: torch.Tensor) -> None:
        """Fill it."""
        self._target.fill(torch.zeros_like(source))


class JoinedTargets:
    """Parts that do not fill whole blocks: they are collected, one below the other, and passed on
    together. `rows`: of each part; `rest`: their other axes."""

    def __init__(
        self,
        rows: list[int],
        rest: tuple[int, ...],
        dtype: torch.dtype,
        done: Callable[[torch.Tensor], None],
    ) -> None:
        self._rows = rows
        self._rest = rest
        self._dtype = dtype
        self._done = done
        self._whole: torch.Tensor | None = None
        self._num_left = len(rows)

    def targets(self) -> list[WeightTarget]:
        """One for each part, in order."""
        return [_PartTarget(self, index) for index in range(len(self._rows))]

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Of part `index`."""
        return (self._rows[index], *self._rest)

    def fill(self, index: int, source: torch.Tensor) -> None:
        """Take part `index`; with the last missing one all are passed on and dropped."""
        if self._whole is None:
            self._whole = torch.empty((sum(self._rows), *self._rest), dtype=self._dtype)
        first = sum(self._rows[:index])
        self._whole[first : first + self._rows[index]] = source
        self._num_left -= 1
        if not self._num_left:
            self._done(self._whole)
            self._whole = None


class _PartTarget:
    def __init__(self, joined: JoinedTargets, index: int) -> None:
        self._joined = joined
        self._index = index
        self.shape = joined.shape_of(index)

    def fill(self, source: torch.Tensor) -> None:
        self._joined.fill(self._index, source)
