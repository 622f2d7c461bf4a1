"""What changes logits before temperature: penalties, bias, and stop ids masked by min_tokens.

Order: repetition (prompt and output), frequency and presence (output), bias, mask. Only rows that
ask for an edit are touched, in place; all rows of a batch go through one tensor operation a kind.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.counts import TokenCounts
from xllm.worker.sampling.rows import SampleRow


def needs_counts(params: SamplingParams) -> bool:
    """Whether a penalty asks which tokens were there."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def needs_edit(row: SampleRow) -> bool:
    """Whether the row's logits change before they are tempered."""
    params = row.sampling
    return (
        needs_counts(params)
        or bool(params.logit_bias)
        or (bool(row.stop_ids) and len(row.output_ids) < params.min_tokens)
    )


def apply_edits(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Edit the rows of `logits` [rows, vocab] in place. Token ids must be below vocab."""
    edited = [index for index, row in enumerate(rows) if needs_edit(row)]
    if not edited:
        return
    _repetition(logits, rows, edited)
    _counted(logits, rows, edited)
    _bias(logits, rows, edited)
    masked = _Entries()
    for index in edited:
        row = rows[index]
        if len(row.output_ids) < row.sampling.min_tokens:
            masked.add(index, row.stop_ids, 0.0)
    if masked:
        where = masked.where(logits.device)
        logits[where] = -torch.inf


def _repetition(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    entries = _Entries()
    for index in edited:
        row = rows[index]
        penalty = row.sampling.repetition_penalty
        if penalty != 1.0:
            entries.add(index, _counts(row).seen_ids, penalty)
    if entries:
        where = entries.where(logits.device)
        penalty_of = entries.values(logits)
        old = logits[where]
        logits[where] = torch.where(old > 0, old / penalty_of, old * penalty_of)


def _counted(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    entries = _Entries()
    for index in edited:
        presence = rows[index].sampling.presence_penalty
        frequency = rows[index].sampling.frequency_penalty
        if presence or frequency:
            counts = _counts(rows[index])
            deltas = [presence + frequency * count for count in counts.output_counts]
            entries.add_each(index, counts.output_ids, deltas)
    if entries:
        logits[entries.where(logits.device)] -= entries.values(logits)


def _bias(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    entries = _Entries()
    for index in edited:
        bias = rows[index].sampling.logit_bias
        entries.add_each(index, list(bias), list(bias.values()))
    if entries:
        logits[entries.where(logits.device)] += entries.values(logits)


def _counts(row: SampleRow) -> TokenCounts:
    return row.counts or TokenCounts(row.prompt_ids, row.output_ids)


class _Entries:
    """Places of the logits and a value for each, in runs of one row."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._values = array("d")

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(self, row: int, ids: Sequence[int], value: float) -> None:
        """The same value at several ids of one row."""
        self._add_ids(row, ids)
        self._values.extend(array("d", (value,)) * len(ids))

    def add_each(self, row: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """A value of its own at each of several ids of one row."""
        self._add_ids(row, ids)
        self._values.extend(values)

    def where(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column indices."""
        rows = torch.tensor(self._rows).repeat_interleave(torch.tensor(self._lengths))
        return rows.to(device), torch.frombuffer(self._ids, dtype=torch.int64).to(device)

    def values(self, like: torch.Tensor) -> torch.Tensor:
        """The values, of the type and device of `like`."""
        return torch.frombuffer(self._values, dtype=torch.float64).to(like.device, like.dtype)

    def _add_ids(self, row: int, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._rows.append(row)
        self._lengths.append(len(ids))
