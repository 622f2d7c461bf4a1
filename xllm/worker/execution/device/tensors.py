"""A step's numbers on the device, brought there in one copy.

Numbers of 64 bits first, those of 32 behind them: a view for each. Where a graph is replayed its
tensors are always the same ones; otherwise they are the step's own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from xllm.worker.execution.device.draws import StepDraws
from xllm.worker.execution.device.rows import StepRows
from xllm.worker.graphs.choice import DrawKind
from xllm.worker.platform.platform import Platform
from xllm.worker.triton_kernels.draw_rows import ROW_NUMBERS

_ALIGNMENT = 16
"""Bytes at a multiple of which every part begins, whatever is before it: a kernel is compiled anew
for a pointer that does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepTensors:
    """See StepRows and StepDraws. `row_tiles` int32 [tiles, 2]: which sequence and which of its
    rows each tile of a prefill's attention takes; empty where there are decodes alone."""

    token_ids: torch.Tensor
    sources: torch.Tensor
    row_addresses: torch.Tensor
    addresses: torch.Tensor
    read_rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    row_starts: torch.Tensor
    row_tiles: torch.Tensor
    draws: torch.Tensor
    places: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class StepSizes:
    """How many rows, sequences, rows that are read, tiles and draws the tensors of a step have."""

    num_rows: int
    num_sequences: int
    num_read: int
    num_tiles: int
    num_draws: int


def pack_numbers(
    rows: StepRows, row_tiles: NDArray[np.int32], draws: StepDraws
) -> NDArray[np.uint8]:
    """All numbers of a step as bytes, in the order of `split_numbers`."""
    wide = [rows.token_ids, rows.sources, rows.row_addresses, rows.addresses, rows.read_rows]
    wide += [draws.numbers.reshape(-1), draws.places]
    narrow = [rows.positions, rows.lengths, rows.row_starts, row_tiles.reshape(-1)]
    parts = [*(part.view(np.uint8) for part in wide), *(part.view(np.uint8) for part in narrow)]
    packed = np.zeros(sum(_aligned(part.nbytes) for part in parts), dtype=np.uint8)
    at = 0
    for part in parts:
        packed[at : at + part.nbytes] = part
        at += _aligned(part.nbytes)
    return packed


def packed_bytes(sizes: StepSizes) -> int:
    """Bytes of a step of these sizes."""
    return sum(_aligned(count * size) for count, size in _parts(sizes))


def split_numbers(data: torch.Tensor, sizes: StepSizes) -> StepTensors:
    """Views of packed numbers (uint8, flat) of a step of these sizes."""
    found, at = [], 0
    for count, size in _parts(sizes):
        dtype = torch.int64 if size == 8 else torch.int32
        found.append(data[at : at + count * size].view(dtype))
        at += _aligned(count * size)
    ids, sources, in_rows, addresses, read, draws, places, positions, lengths, starts, tiles = found
    return StepTensors(
        ids,
        sources,
        in_rows,
        addresses,
        read,
        positions,
        lengths,
        starts,
        tiles.view(-1, 2),
        draws.view(-1, ROW_NUMBERS),
        places,
    )


def _parts(sizes: StepSizes) -> list[tuple[int, int]]:
    """Numbers of each part and bytes of each."""
    rows, sequences, draws = sizes.num_rows, sizes.num_sequences, sizes.num_draws
    wide = [rows, rows, rows, sequences, sizes.num_read, draws * ROW_NUMBERS, draws]
    narrow = [rows, sequences, sequences + 1, 2 * sizes.num_tiles]
    return [*((count, 8) for count in wide), *((count, 4) for count in narrow)]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class StaticNumbers:
    """The tensors that a graph reads: made once for a number of rows and sequences. Where there are
    sequences all their rows may be read, to draw from or not; none are tiled."""

    def __init__(self, platform: Platform, num_rows: int, num_sequences: int) -> None:
        self._platform = platform
        num_read = num_rows if num_sequences else 0
        self._sizes = StepSizes(num_rows, num_sequences, num_read, 0, num_read)
        self._data = torch.zeros(
            packed_bytes(self._sizes), dtype=torch.uint8, device=platform.device
        )
        self.tensors = split_numbers(self._data, self._sizes)

    def fill(self, rows: StepRows, draws: StepDraws | None) -> None:
        """Begin to bring a step's numbers here, padded: rows behind those that are drawn from are
        absent, and their tokens nobody's."""
        sizes = self._sizes
        padded = rows.padded(sizes.num_rows, sizes.num_sequences)
        missing = sizes.num_read - len(rows.read_rows)
        padded = dataclasses.replace(padded, read_rows=np.pad(rows.read_rows, (0, missing)))
        all_draws = padded_draws(draws, sizes.num_draws)
        packed = pack_numbers(padded, np.empty((0, 2), dtype=np.int32), all_draws)
        self._platform.upload(torch.from_numpy(packed), self._data)


def padded_draws(draws: StepDraws | None, num_draws: int) -> StepDraws:
    """So many draws, those behind the real ones absent and nobody's: zeros say both."""
    numbers = np.zeros((num_draws, ROW_NUMBERS), dtype=np.int64)
    places = np.zeros(num_draws, dtype=np.int64)
    if draws is None:
        return StepDraws(numbers, places, DrawKind.NONE)
    count = len(draws.places)
    numbers[:count], places[:count] = draws.numbers, draws.places
    return StepDraws(numbers, places, draws.kind)


def upload_numbers(
    platform: Platform, rows: StepRows, row_tiles: NDArray[np.int32], draws: StepDraws | None
) -> StepTensors:
    """A step's own tensors."""
    packed = pack_numbers(rows, row_tiles, padded_draws(None, 0) if draws is None else draws)
    data = platform.upload(torch.from_numpy(packed))
    counts, num_draws = rows.counts, 0 if draws is None else len(draws.places)
    sizes = StepSizes(
        counts.num_rows, counts.num_sequences, len(rows.read_rows), len(row_tiles), num_draws
    )
    return split_numbers(data, sizes)
