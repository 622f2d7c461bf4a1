"""From the last layer's output to tokens and logprobs: head, prompt scores, sampler.

The head is applied to the rows that need it, in slices, so that the logits of a long scored chunk
never stand in memory at once. Drawn tokens join their sequence's history here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.rank_head import Head, ModelHead
from xllm.worker.models.model import DecoderModel
from xllm.worker.sampling.edits import needs_counts
from xllm.worker.sampling.greedy import BestTokens, best_tokens
from xllm.worker.sampling.logprobs import score_rows
from xllm.worker.sampling.rows import SampleResult, SampleRow
from xllm.worker.sampling.sampler import Sampler

_SLICE_BYTES = 32 << 20
"""Logits in memory at a time, in fp32."""

_NOT_FINITE = "the model's output is not a number (an overflow of its type?)"


class TokenDrawer:
    """Draws the tokens of steps with one model. `tick` is called after each bounded piece of
    work. `alone`: the head and the draws see one row at a time, so that a row's numbers are
    independent of the rows beside it; the head need not where `head_invariant`. `head`: that of
    several ranks; None: the model's. `best`: finds the greedy tokens."""

    def __init__(
        self,
        model: DecoderModel,
        device: torch.device,
        tick: Callable[[], None],
        *,
        alone: bool = False,
        head_invariant: bool = False,
        head: Head | None = None,
        best: BestTokens = best_tokens,
    ) -> None:
        vocab_size = model.config.vocab_size
        self._head = head or ModelHead(model.head)
        self._device = device
        self._tick = tick
        self._best = best
        self._sampler = Sampler(vocab_size, device, tick, best)
        most = max(_SLICE_BYTES // (4 * vocab_size), 1)
        self._slice = 1 if alone and not head_invariant else most
        self._draws = 1 if alone else most

    def draw(self, batch: StepBatch, hidden: torch.Tensor, outputs: StepOutputs) -> None:
        """Score and draw for every entry of `batch`, whose rows' last hidden states [rows,
        hidden] are given. Entries whose numbers are not finite fail; the others have their
        tokens in `outputs` and in their sequences."""
        drawing = []
        for entry, finite in zip(batch.entries, self._finite(batch, hidden), strict=True):
            if not finite:
                outputs.fail(entry.index, _NOT_FINITE)
                continue
            if entry.item.score_prompt:
                self._score(entry, hidden, outputs)
            if entry.item.num_samples:
                drawing.append(entry)
        for part in _parts(drawing, self._slice):
            self._sample(part, hidden, outputs)

    def _finite(self, batch: StepBatch, hidden: torch.Tensor) -> list[bool]:
        """Whether each entry's last row is made of numbers: it has seen all rows before it."""
        if not batch.entries:
            return []
        last = self._index([entry.last_row for entry in batch.entries])
        found: list[bool] = hidden.index_select(0, last).isfinite().all(dim=-1).tolist()
        return found

    def _score(self, entry: BatchEntry, hidden: torch.Tensor, outputs: StepOutputs) -> None:
        """Logprobs of the prompt tokens that the entry's rows predict: row k is at position
        start + k and predicts the next one, which the history knows even across a chunk's end."""
        item, state = entry.item, entry.state
        first = item.start + 1
        last = min(item.start + item.num_tokens + 1, len(state.prompt_ids))
        num_top = state.sampling.prompt_logprobs or 0
        for at in range(first, last, self._slice):
            ids = state.tokens(at, min(at + self._slice, last))
            row = entry.first_row + at - first
            logits = self._head.whole(self._head.part(hidden[row : row + len(ids)]))
            self._tick()
            table = score_rows(logits, self._index(ids), num_top, tick=self._tick)
            outputs.add_logprobs(entry.index, table)

    def _sample(
        self, entries: Sequence[BatchEntry], hidden: torch.Tensor, outputs: StepOutputs
    ) -> None:
        places = self._index([entry.last_row for entry in entries])
        part = self._head.part(hidden.index_select(0, places))
        self._tick()
        rows = [sample_row(entry) for entry in entries]
        is_bare = [self._sampler.takes_best(row) for row in rows]
        bare = [index for index, found in enumerate(is_bare) if found]
        others = [index for index, found in enumerate(is_bare) if not found]
        if bare:
            tops, ids = self._head.best(_of(part, bare), self._best)
            self._tick()
            result = self._sampler.take_best(tops, ids, [rows[index] for index in bare])
            self._settle([entries[index] for index in bare], result, outputs)
        if not others:
            return
        logits = self._head.whole(_of(part, others))
        self._tick()
        for at in range(0, len(others), self._draws):
            drawn = others[at : at + self._draws]
            result = self._sampler.sample(
                logits[at : at + self._draws], [rows[index] for index in drawn]
            )
            self._settle([entries[index] for index in drawn], result, outputs)

    def _settle(
        self, entries: Sequence[BatchEntry], result: SampleResult, outputs: StepOutputs
    ) -> None:
        reasons = dict(result.failed)
        for number, entry in enumerate(entries):
            if number in reasons:
                outputs.fail(entry.index, reasons[number])
                continue
            tokens = result.tokens[number]
            outputs.tokens[entry.index] = tokens
            table = result.logprobs[number]
            if table is not None:
                outputs.add_logprobs(entry.index, table)
            entry.state.append(tokens[entry.state.choice if len(tokens) > 1 else 0])

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def sample_row(entry: BatchEntry) -> SampleRow:
    """What the draw of an entry's token depends on."""
    state = entry.state
    return SampleRow(
        sampling=state.sampling,
        choice=state.choice,
        position=state.length,
        prompt_ids=state.prompt_ids,
        output_ids=state.output_ids,
        stop_ids=state.stop_ids,
        num_samples=entry.item.num_samples,
        counts=state.counted() if needs_counts(state.sampling) else None,
    )


def _of(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of logits, in order; no copy where they are all."""
    return part if len(rows) == len(part) else part[list(rows)]


def _parts(entries: Sequence[BatchEntry], size: int) -> Iterator[Sequence[BatchEntry]]:
    for at in range(0, len(entries), size):
        yield entries[at : at + size]
