"""From the last layer's output to tokens and logprobs: head, prompt scores, sampler.

The head is applied to the rows that need it, in slices, so that the logits of a long scored chunk
never stand in memory at once. Drawn tokens join their sequence's history here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.rank_head import Head, ModelHead
from xllm.worker.models.model import DecoderModel
from xllm.worker.sampling.edits import needs_counts
from xllm.worker.sampling.greedy import BestTokens, best_tokens
from xllm.worker.sampling.logprobs import score_rows
from xllm.worker.sampling.rows import LogprobTable, SampleResult, SampleRow
from xllm.worker.sampling.sampler import Sampler
from xllm.worker.verifying import num_accepted

_SLICE_BYTES = 32 << 20
"""Logits in memory at a time, in fp32."""

_NOT_FINITE = "the model's output is not a number (an overflow of its type?)"


@dataclasses.dataclass(slots=True)
class _Draw:
    """The draw from row `row`, which stands behind `num_drafts` drafts of its entry, and what came
    of it: `tokens`, or none and the reason."""

    entry: BatchEntry
    row: int
    num_drafts: int
    tokens: tuple[int, ...] = ()
    table: LogprobTable | None = None
    reason: str = ""


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
        draws: list[list[_Draw]] = []
        for entry, num_finite in zip(batch.entries, self._finite(batch, hidden), strict=True):
            rows = entry.draw_rows
            outputs.left_nan = outputs.left_nan or num_finite < len(rows)
            if not num_finite and entry.drafts:
                continue  # it may be a draft's fault: see `verifying`
            if not num_finite:
                outputs.fail(entry.index, _NOT_FINITE)
                continue
            if entry.item.score_prompt:
                self._score(entry, hidden, outputs)
            if entry.item.num_samples:
                # What a draft made of the rows behind it is no fault of the sequence.
                sound = rows[:num_finite]
                draws.append([_Draw(entry, row, number) for number, row in enumerate(sound)])
        for part in _parts([draw for one in draws for draw in one], self._slice):
            self._sample(part, hidden)
        for one in draws:
            _settle(one, outputs)

    def _finite(self, batch: StepBatch, hidden: torch.Tensor) -> list[int]:
        """How many of the rows that each entry may draw from are made of numbers: a row has seen
        all rows before it, so that none behind one that is not can be."""
        if not batch.entries:
            return []
        rows = self._index([row for entry in batch.entries for row in entry.draw_rows])
        found: list[bool] = hidden.index_select(0, rows).isfinite().all(dim=-1).tolist()
        counts, at = [], 0
        for entry in batch.entries:
            end = at + len(entry.draw_rows)
            counts.append([*found[at:end], False].index(False))
            at = end
        return counts

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

    def _sample(self, draws: Sequence[_Draw], hidden: torch.Tensor) -> None:
        places = self._index([draw.row for draw in draws])
        part = self._head.part(hidden.index_select(0, places))
        self._tick()
        rows = [sample_row(draw.entry, draw.num_drafts) for draw in draws]
        is_bare = [self._sampler.takes_best(row) for row in rows]
        bare = [index for index, found in enumerate(is_bare) if found]
        others = [index for index, found in enumerate(is_bare) if not found]
        if bare:
            tops, ids = self._head.best(_of(part, bare), self._best)
            self._tick()
            result = self._sampler.take_best(tops, ids, [rows[index] for index in bare])
            _note([draws[index] for index in bare], result)
        if not others:
            return
        logits = self._head.whole(_of(part, others))
        self._tick()
        for at in range(0, len(others), self._draws):
            drawn = others[at : at + self._draws]
            result = self._sampler.sample(
                logits[at : at + self._draws], [rows[index] for index in drawn]
            )
            _note([draws[index] for index in drawn], result)

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def sample_row(entry: BatchEntry, num_drafts: int = 0) -> SampleRow:
    """What the draw of an entry's token depends on, behind so many of its drafts."""
    state = entry.state
    counts = state.counted() if needs_counts(state.sampling) else None
    output_ids: Sequence[int] = state.output_ids
    if num_drafts:
        drafts = entry.drafts[:num_drafts]
        counts = None if counts is None else counts.behind(drafts)
        if len(output_ids) < state.sampling.min_tokens:
            output_ids = [*output_ids, *drafts]
    return SampleRow(
        sampling=state.sampling,
        choice=state.choice,
        position=state.length + num_drafts,
        prompt_ids=state.prompt_ids,
        output_ids=output_ids,
        stop_ids=state.stop_ids,
        num_samples=entry.item.num_samples,
        counts=counts,
    )


def _note(draws: Sequence[_Draw], result: SampleResult) -> None:
    reasons = dict(result.failed)
    for number, draw in enumerate(draws):
        draw.tokens, draw.table = result.tokens[number], result.logprobs[number]
        draw.reason = reasons.get(number, "")


def _settle(draws: Sequence[_Draw], outputs: StepOutputs) -> None:
    """Bring what an entry drew into its sequence and the outputs."""
    first, entry = draws[0], draws[0].entry
    if first.reason:
        if not entry.drafts:
            outputs.fail(entry.index, first.reason)
        return
    if not entry.is_verified:
        kept, tokens = draws, first.tokens
        entry.state.append(tokens[entry.state.choice if len(tokens) > 1 else 0])
    else:
        sound = [draw.tokens[0] for draw in itertools.takewhile(lambda one: not one.reason, draws)]
        tokens = tuple(sound[: num_accepted(entry.drafts, sound)])
        kept = draws[: len(tokens)]
        for token in tokens:
            entry.state.append(token)
    outputs.tokens[entry.index] = tokens
    for draw in kept:
        if draw.table is not None:
            outputs.add_logprobs(entry.index, draw.table)


def _of(part: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of logits, in order; no copy where they are all."""
    return part if len(rows) == len(part) else part[list(rows)]


def _parts(draws: Sequence[_Draw], size: int) -> Iterator[Sequence[_Draw]]:
    for at in range(0, len(draws), size):
        yield draws[at : at + size]
