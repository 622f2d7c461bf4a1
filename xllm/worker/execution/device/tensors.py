"""A step's numbers on the device, brought there in one copy.

Numbers of 64 bits first, those of 32 behind them: a view for each. Where a graph is replayed its
tensors are always the same ones; otherwise they are the step's own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from xllm.worker.execution.device.rows import StepRows
from xllm.worker.platform.platform import Platform

_ALIGNMENT = 16
"""Bytes at a multiple of which every part begins, whatever is before it: a kernel is compiled anew
for a pointer that does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepTensors:
    """See StepRows. `row_tiles` int32 [tiles, 2]: which sequence and which of its rows each tile
    of a prefill's attention takes; empty where there are decodes alone."""

    token_ids: torch.Tensor
    sources: torch.Tensor
    row_addresses: torch.Tensor
    addresses: torch.Tensor
    read_rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    row_starts: torch.Tensor
    row_tiles: torch.Tensor


def pack_numbers(rows: StepRows, row_tiles: NDArray[np.int32]) -> NDArray[np.uint8]:
    """All numbers of a step as bytes, in the order of `split_numbers`."""
    wide = [rows.token_ids, rows.sources, rows.row_addresses, rows.addresses, rows.read_rows]
    narrow = [rows.positions, rows.lengths, rows.row_starts, row_tiles.reshape(-1)]
    parts = [*(part.view(np.uint8) for part in wide), *(part.view(np.uint8) for part in narrow)]
    packed = np.zeros(sum(_aligned(part.nbytes) for part in parts), dtype=np.uint8)
    at = 0
    for part in parts:
        packed[at : at + part.nbytes] = part
        at += _aligned(part.nbytes)
    return packed


def packed_bytes(num_rows: int, num_sequences: int, num_read: int, num_tiles: int) -> int:
    """Bytes of a step of these sizes."""
    return sum(
        _aligned(count * size)
        for count, size in _parts(num_rows, num_sequences, num_read, num_tiles)
    )


def split_numbers(
    data: torch.Tensor, num_rows: int, num_sequences: int, num_read: int, num_tiles: int
) -> StepTensors:
    """Views of packed numbers (uint8, flat) of a step of these sizes."""
    found, at = [], 0
    for count, size in _parts(num_rows, num_sequences, num_read, num_tiles):
        dtype = torch.int64 if size == 8 else torch.int32
        found.append(data[at : at + count * size].view(dtype))
        at += _aligned(count * size)
    ids, sources, places, addresses, read, positions, lengths, starts, tiles = found
    return StepTensors(
        ids, sources, places, addresses, read, positions, lengths, starts, tiles.view(-1, 2)
    )


def _parts(
    num_rows: int, num_sequences: int, num_read: int, num_tiles: int
) -> list[tuple[int, int]]:
    """Numbers of each part and bytes of each."""
    wide = [num_rows, num_rows, num_rows, num_sequences, num_read]
    narrow = [num_rows, num_sequences, num_sequences + 1, 2 * num_tiles]
    return [*((count, 8) for count in wide), *((count, 4) for count in narrow)]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class StaticNumbers:
    """The tensors that a graph reads: made once for a number of rows and sequences, at most one row
    of each of which is read and none of which are tiled."""

    def __init__(self, platform: Platform, num_rows: int, num_sequences: int) -> None:
        self._platform = platform
        self._sizes = (num_rows, num_sequences, num_sequences, 0)
        self._data = torch.zeros(
            packed_bytes(*self._sizes), dtype=torch.uint8, device=platform.device
        )
        self.tensors = split_numbers(self._data, *self._sizes)

    def fill(self, rows: StepRows) -> None:
        """Begin to bring a step's numbers here, padded."""
        num_rows, num_sequences, num_read, _ = self._sizes
        padded = rows.padded(num_rows, num_sequences)
        missing = num_read - len(rows.read_rows)
        padded = dataclasses.replace(padded, read_rows=np.pad(rows.read_rows, (0, missing)))
        packed = pack_numbers(padded, np.empty((0, 2), dtype=np.int32))
        self._platform.upload(torch.from_numpy(packed), self._data)


def upload_numbers(platform: Platform, rows: StepRows, row_tiles: NDArray[np.int32]) -> StepTensors:
    """A step's own tensors."""
    packed = pack_numbers(rows, row_tiles)
    data = platform.upload(torch.from_numpy(packed))
    counts = rows.counts
    return split_numbers(
        data, counts.num_rows, counts.num_sequences, len(rows.read_rows), len(row_tiles)
    )
