"""Batches of sequences as the executor builds them, and copies that end when a test says so."""

from __future__ import annotations

import threading
from array import array

import torch

from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, ItemOptions, NewSequence, StepItem, StepPlan
from xllm.worker.attention.plan import Span
from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.sequences import SequenceTable

SLOT_BYTES = 1 << 20
FIRST_ADDRESS = 1 << 30
PATIENCE_S = 30


GREEDY = SamplingParams(temperature=0.0, seed=0)


def table_of(
    prompts: dict[int, int], vocab_size: int = 100, sampling: SamplingParams = GREEDY
) -> SequenceTable:
    """Sequences by number with prompts of some length; sequence n has slot n."""
    table = SequenceTable(1 << 20, vocab_size)
    table.begin(
        StepPlan(
            0,
            new=tuple(
                NewSequence(
                    seq,
                    tuple((seq + at) % vocab_size for at in range(length)),
                    (),
                    sampling,
                    0,
                    slot=seq,
                )
                for seq, length in prompts.items()
            ),
        )
    )
    return table


def batch_of(
    table: SequenceTable, parts: list[tuple[int, int, int]], drawn=True, verified=()
) -> StepBatch:
    """A batch of items: (sequence, first position, tokens) each. Those of the sequences `verified`
    are drafts behind a first token."""
    batch = StepBatch()
    for index, (seq, start, count) in enumerate(parts):
        state = table.find(seq)
        is_last = start + count == state.length
        item = StepItem(seq, ItemKind.PREFILL, start, count, num_samples=int(drawn and is_last))
        if seq in verified:
            ids = tuple(state.tokens(start, start + count))
            item = StepItem(seq, ItemKind.VERIFY, start, count, options=ItemOptions(token_ids=ids))
        batch.entries.append(BatchEntry(index, item, state, len(batch.token_ids)))
        address = FIRST_ADDRESS + seq * SLOT_BYTES
        batch.spans.append(Span(start, count, array("q", [0] * 64), address))
        batch.token_ids.extend(state.tokens(start, start + count))
    return batch


class HeldCopy:
    """A HostCopy that is there once `arrive` was called, or failed."""

    def __init__(self, values: list[int] | None = None) -> None:
        self._values = values
        self._there = threading.Event()
        self._error: Exception | None = None

    def arrive(self, values: list[int] | None = None) -> None:
        self._values = self._values if values is None else values
        self._there.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._there.set()

    def is_done(self) -> bool:
        return self._there.is_set()

    def wait(self) -> torch.Tensor:
        assert self._there.wait(PATIENCE_S)
        if self._error is not None:
            raise self._error
        return torch.tensor(self._values, dtype=torch.int64)
