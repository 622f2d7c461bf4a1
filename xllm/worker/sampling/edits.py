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

_DOUBLE = torch.float64


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
    """Edit the rows of `logits` [rows, vocab] (contiguous) in place. Token ids must be below
    vocab."""
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
            masked.add(index, row.stop_ids)
    if masked:
        logits.view(-1)[masked.where(logits)] = -torch.inf


def _repetition(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    entries = _Entries()
    for index in edited:
        penalty = rows[index].sampling.repetition_penalty
        if penalty != 1.0:
            entries.add(index, _counts(rows[index]).seen_ids, penalty)
    if entries:
        flat, where = logits.view(-1), entries.where(logits)
        penalty_of = entries.factors(logits)
        old = flat.index_select(0, where)
        new = torch.where(old > 0, old / penalty_of, old * penalty_of)
        flat.index_copy_(0, where, new)


def _counted(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    present, frequent = _Entries(), _Entries()
    counted = array("d")
    for index in edited:
        params = rows[index].sampling
        if params.presence_penalty or params.frequency_penalty:
            counts = _counts(rows[index])
            present.add(index, counts.output_ids, params.presence_penalty)
            frequent.add(index, (), params.frequency_penalty, len(counts.output_ids))
            counted.extend(counts.output_counts)
    if present:
        delta = present.factors() + frequent.factors() * torch.frombuffer(counted, dtype=_DOUBLE)
        _subtract(logits, present, delta)


def _bias(logits: torch.Tensor, rows: Sequence[SampleRow], edited: list[int]) -> None:
    entries, values = _Entries(), array("d")
    for index in edited:
        bias = rows[index].sampling.logit_bias
        entries.add(index, list(bias))
        values.extend(bias.values())
    if entries:
        _subtract(logits, entries, -torch.frombuffer(values, dtype=_DOUBLE))


def _subtract(logits: torch.Tensor, entries: _Entries, values: torch.Tensor) -> None:
    """Values (float64, on the host) from the places of `entries`, which are distinct."""
    flat, where = logits.view(-1), entries.where(logits)
    new = flat.index_select(0, where) - values.to(logits.device, logits.dtype)
    flat.index_copy_(0, where, new)


def _counts(row: SampleRow) -> TokenCounts:
    return row.counts or TokenCounts(row.prompt_ids, row.output_ids)


class _Entries:
    """Places of the logits, in runs of one row, and a factor for each run."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._factors: list[float] = []

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(self, row: int, ids: Sequence[int], factor: float = 0.0, length: int = -1) -> None:
        """A run: ids of one row (or, with `length`, as many as another has)."""
        self._ids.extend(ids)
        self._rows.append(row)
        self._lengths.append(len(ids) if length < 0 else length)
        self._factors.append(factor)

    def where(self, logits: torch.Tensor) -> torch.Tensor:
        """int64: the places in the flat `logits` [rows, vocab]."""
        offsets = torch.tensor(self._rows) * logits.shape[1]
        places = offsets.repeat_interleave(torch.tensor(self._lengths))
        return places.add_(torch.frombuffer(self._ids, dtype=torch.int64)).to(logits.device)

    def factors(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """The factor of each place: float64 on the host, or of the type and device of `like`."""
        factors = torch.tensor(self._factors, dtype=_DOUBLE)
        spread = factors.repeat_interleave(torch.tensor(self._lengths))
        return spread if like is None else spread.to(like.device, like.dtype)
