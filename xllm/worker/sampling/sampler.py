"""The sampler: rows of logits in, tokens and log-probabilities out.

Order: (raw log-probabilities are taken,) penalties, bias and masks, temperature, top-k, top-p,
min-p, arg-max with Gumbel noise. It groups the rows of a batch by what they need, so that a greedy
or a plainly tempered row never pays for another's filters. It remembers nothing between calls.
Invariant: a row's tokens depend on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from xllm.errors import InvariantError
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.candidates import (
    FLAT_VOCAB,
    Candidates,
    find_candidates,
    is_filtered,
    temperature_of,
    window_sizes,
)
from xllm.worker.sampling.draw import draw_filtered, draw_plain
from xllm.worker.sampling.edits import apply_edits, needs_edit
from xllm.worker.sampling.greedy import BestTokens, best_tokens
from xllm.worker.sampling.logprobs import score_rows
from xllm.worker.sampling.noise_tensor import DrawKey
from xllm.worker.sampling.nucleus import find_nucleus
from xllm.worker.sampling.rows import LogprobTable, SampleResult, SampleRow

T = TypeVar("T")

SLICE_ELEMENTS = 1 << 18
"""Logits scored at a time: with its scratch a slice stays in a core's cache."""


class Sampler:
    """Draws the tokens of a model with `vocab_size` logits a row, on `device`. `tick` is called
    after each bounded piece of work; `best` finds the largest logit of rows and its token."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        tick: Callable[[], None] | None = None,
        best: BestTokens = best_tokens,
    ) -> None:
        self._vocab_size = vocab_size
        self._best = best
        self._tick = tick or (lambda: None)
        self._all_ids = torch.arange(vocab_size, dtype=torch.int32, device=device)

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> SampleResult:
        """Draw for each row of `logits` [rows, vocab] float32, which is edited in place."""
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            raise InvariantError(
                f"sampler: logits {tuple(logits.shape)} {logits.dtype} for {len(rows)} rows "
                f"of {self._vocab_size} float32"
            )
        if not rows:
            return SampleResult([], [], [])
        failed = self._bad_rows(rows)
        scored = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        raw = logits[scored].clone() if scored else None
        apply_edits(logits, [_inert(row) if i in failed else row for i, row in enumerate(rows)])
        self._tick()
        tokens: list[tuple[int, ...]] = [()] * len(rows)
        greedy = [i for i, row in enumerate(rows) if row.sampling.temperature == 0]
        others = [i for i, row in enumerate(rows) if row.sampling.temperature != 0]
        self._draw_greedy(logits, rows, greedy, tokens, failed)
        self._draw_noisy(logits, rows, others, tokens, failed)
        for index in failed:
            tokens[index] = ()
        logprobs: list[LogprobTable | None] = [None] * len(rows)
        if raw is not None:
            self._score_drawn(raw, scored, rows, tokens, logprobs)
        return SampleResult(tokens, logprobs, sorted(failed.items()))

    def takes_best(self, row: SampleRow) -> bool:
        """Whether the best of the row's logits is all that is asked for: `take_best` then gives
        what `sample` would."""
        return (
            row.sampling.temperature == 0
            and row.sampling.logprobs is None
            and not needs_edit(row)
            and not self._bad_rows([row])
        )

    def take_best(
        self, tops: torch.Tensor, ids: torch.Tensor, rows: Sequence[SampleRow]
    ) -> SampleResult:
        """The result of rows that take their best: maxima and ids [rows], as of `best_tokens`."""
        failed: dict[int, str] = {}
        _note_bad(tops, range(len(rows)), failed)
        tokens = [
            () if index in failed else (token,) * row.num_samples
            for index, (row, token) in enumerate(zip(rows, ids.tolist(), strict=True))
        ]
        return SampleResult(tokens, [None] * len(rows), sorted(failed.items()))

    def score_rows(
        self, logits: torch.Tensor, targets: Sequence[int] | torch.Tensor, num_top: int
    ) -> LogprobTable:
        """Raw log-probabilities of given tokens, for prompt_logprobs: row k of `logits` scores
        `targets[k]`. The logits stay as they are."""
        return score_rows(logits, torch.as_tensor(targets), num_top)

    def _bad_rows(self, rows: Sequence[SampleRow]) -> dict[int, str]:
        failed: dict[int, str] = {}
        for index, row in enumerate(rows):
            for name, ids in (("logit_bias", row.sampling.logit_bias), ("stop_ids", row.stop_ids)):
                wrong = [token for token in ids if not 0 <= token < self._vocab_size]
                if wrong:
                    failed[index] = (
                        f"{name}: token {wrong[0]} of a vocabulary of {self._vocab_size}"
                    )
        return failed

    def _draw_greedy(
        self,
        logits: torch.Tensor,
        rows: Sequence[SampleRow],
        greedy: list[int],
        tokens: list[tuple[int, ...]],
        failed: dict[int, str],
    ) -> None:
        if not greedy:
            return
        part = logits if len(greedy) == len(rows) else logits[greedy]
        top, best = self._best(part)
        _note_bad(top, greedy, failed)
        for index, token in zip(greedy, best.tolist(), strict=True):
            tokens[index] = (token,) * rows[index].num_samples
        self._tick()

    def _draw_noisy(
        self,
        logits: torch.Tensor,
        rows: Sequence[SampleRow],
        noisy: list[int],
        tokens: list[tuple[int, ...]],
        failed: dict[int, str],
    ) -> None:
        if not noisy:
            return
        tops = logits.amax(dim=1)
        _note_bad(tops[noisy], noisy, failed)
        sound = [index for index in noisy if index not in failed]
        filtered = [i for i in sound if is_filtered(rows[i].sampling, self._vocab_size)]
        plain = [i for i in sound if not is_filtered(rows[i].sampling, self._vocab_size)]
        drawn: dict[int, list[int]] = {index: [] for index in sound}
        per_slice = max(1, SLICE_ELEMENTS // self._vocab_size)
        for part in _slices([(i, key) for i in plain for key in _draws(rows[i])], per_slice):
            owners = [index for index, _ in part]
            heat = [temperature_of(rows[index].sampling) for index in owners]
            found = draw_plain(
                logits[owners],
                tops[owners],
                torch.tensor(heat, dtype=torch.float64, device=logits.device),
                [key for _, key in part],
                self._all_ids,
            )
            for index, token in zip(owners, found, strict=True):
                drawn[index].append(token)
            self._tick()
        for group in _slices(filtered, max(1, 8 * per_slice)):
            self._draw_filtered(logits, tops, rows, group, drawn)
        for index, values in drawn.items():
            tokens[index] = tuple(values)

    def _draw_filtered(
        self,
        logits: torch.Tensor,
        tops: torch.Tensor,
        rows: Sequence[SampleRow],
        group: list[int],
        drawn: dict[int, list[int]],
    ) -> None:
        left = group
        windows = window_sizes([rows[i].sampling for i in group], self._vocab_size)
        for window in windows:
            first = window == windows[0] < self._vocab_size
            if self._vocab_size >= FLAT_VOCAB and not first:
                left = self._draw_flat(logits, tops, rows, left, drawn)
            if not left:
                return
            params = [rows[index].sampling for index in left]
            found = find_candidates(logits[left], tops[left], params, window)
            clear: list[bool] = found.clear.tolist()
            places = [place for place in range(len(left)) if clear[place]]
            self._draw_found(found, rows, {place: left[place] for place in places}, drawn)
            left = [index for place, index in enumerate(left) if not clear[place]]

    def _draw_flat(
        self,
        logits: torch.Tensor,
        tops: torch.Tensor,
        rows: Sequence[SampleRow],
        group: list[int],
        drawn: dict[int, list[int]],
    ) -> list[int]:
        """Draw for the rows of `group` without top-k; gives back the others."""
        left = []
        for index in group:
            params = rows[index].sampling
            if 0 < params.top_k < self._vocab_size:
                left.append(index)
                continue
            found = find_nucleus(logits[index], tops[index].item(), params)
            self._draw_found(found, rows, {0: index}, drawn)
        return left

    def _draw_found(
        self,
        found: Candidates,
        rows: Sequence[SampleRow],
        row_of_place: dict[int, int],
        drawn: dict[int, list[int]],
    ) -> None:
        """All draws of some rows whose candidates are `found`, a bounded number at a time."""
        work = [
            (place, index, key)
            for place, index in row_of_place.items()
            for key in _draws(rows[index])
        ]
        for part in _slices(work, max(1, SLICE_ELEMENTS // found.ids.shape[1])):
            chosen = draw_filtered(found, [w[0] for w in part], [w[2] for w in part])
            for (_, index, _), token in zip(part, chosen, strict=True):
                drawn[index].append(token)
            self._tick()

    def _score_drawn(
        self,
        raw: torch.Tensor,
        scored: list[int],
        rows: Sequence[SampleRow],
        tokens: list[tuple[int, ...]],
        logprobs: list[LogprobTable | None],
    ) -> None:
        """Tables of the rows `scored`, whose raw logits are `raw`, in one go."""
        places = [place for place, index in enumerate(scored) for _ in tokens[index]]
        if not places:
            return
        targets = torch.tensor([token for index in scored for token in tokens[index]])
        num_top = max(rows[index].sampling.logprobs or 0 for index in scored)
        whole = score_rows(
            raw, targets, num_top, None if places == list(range(len(raw))) else places, self._tick
        )
        start = 0
        for index in scored:
            if tokens[index]:
                end = start + len(tokens[index])
                width = 1 + (rows[index].sampling.logprobs or 0)
                logprobs[index] = LogprobTable(
                    whole.ids[start:end, :width],
                    whole.logprobs[start:end, :width],
                    whole.ranks[start:end],
                )
                start = end


def _draws(row: SampleRow) -> list[DrawKey]:
    """The keys of a row's draws."""
    seed = row.sampling.seed or 0
    choices = (row.choice,) if row.num_samples == 1 else range(row.num_samples)
    return [(seed, choice, row.position) for choice in choices]


def _note_bad(tops: torch.Tensor, indices: Sequence[int], failed: dict[int, str]) -> None:
    """A row's maximum is finite unless some of its logits are no numbers."""
    for index, top in zip(indices, tops.tolist(), strict=True):
        if not math.isfinite(top):
            failed.setdefault(index, "the model gave logits that are not finite numbers")


def _inert(row: SampleRow) -> SampleRow:
    """A row that edits nothing, in place of one whose edits cannot be made."""
    return SampleRow(SamplingParams(), row.choice, row.position, (), ())


def _slices(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
