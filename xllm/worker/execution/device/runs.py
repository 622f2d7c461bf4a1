"""Sequences of a step that are attended as decodes, by how many rows each has."""

from __future__ import annotations

import dataclasses

from xllm.worker.execution.device.ops import SequenceRows
from xllm.worker.execution.device.rows import StepRows
from xllm.worker.execution.device.tensors import StepTensors


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRun:
    """Sequences of one number of rows that are attended as decodes, and where their rows are."""

    rows: slice
    rows_each: int
    sequences: SequenceRows


def decode_runs(rows: StepRows, tensors: StepTensors) -> list[DecodeRun]:
    """Those of a step."""
    found, row, first = [], 0, 0
    for each, number in rows.counts.runs:
        addresses = tensors.addresses[first : first + number]
        lengths = tensors.lengths[first : first + number]
        if first:
            # Pointers that are no multiple of 16 are a kernel of their own: see `tensors`.
            addresses, lengths = addresses.clone(), lengths.clone()
        end = row + each * number
        found.append(DecodeRun(slice(row, end), each, SequenceRows(addresses, lengths)))
        row, first = end, first + number
    return found
