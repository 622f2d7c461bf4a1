"""Log-probabilities that the toy engine makes up: no model has them, every path can carry them.

Deterministic in the token: it is its row's best (rank 1, -0.25), and the alternatives after it are
the ids that follow it, each half as probable. Bytes as StepResult's frames want them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from xllm.protocol.step import StepItem
from xllm.worker.toy.sequence import ToySequence

BEST_LOGPROB = -0.25
STEP_LOGPROB = -0.6931471805599453


def made_up_row(token: int, num_top: int, ids: range) -> tuple[list[int], list[float]]:
    """Ids and logprobs of one row: the token, then `num_top` alternatives, itself the first."""
    row_ids = [token]
    row_logprobs = [BEST_LOGPROB]
    for k in range(num_top):
        row_ids.append(token if k == 0 else ids.start + (token - ids.start + k) % len(ids))
        row_logprobs.append(BEST_LOGPROB + k * STEP_LOGPROB)
    return row_ids, row_logprobs


class ScoreFrames:
    """Collects the rows of one step and packs the three frames."""

    def __init__(self, num_top: int, num_items: int, ids: range) -> None:
        self.num_top = num_top
        self.rows = [0] * num_items
        self._ids_range = ids
        self._ids = array("i")
        self._logprobs = array("f")
        self._ranks = array("i")

    def add(self, item: int, token: int) -> None:
        """One more row of item `item`; items come in order."""
        row_ids, row_logprobs = made_up_row(token, self.num_top, self._ids_range)
        self.rows[item] += 1
        self._ids.extend(row_ids)
        self._logprobs.extend(row_logprobs)
        self._ranks.append(1)

    def add_item(
        self, index: int, item: StepItem, sequence: ToySequence, drawn: tuple[int, ...]
    ) -> None:
        """The rows that an item's sequence asks for: of its prompt's tokens, then of `drawn`."""
        if item.score_prompt:
            end = min(item.start + item.num_tokens + 1, sequence.prompt_len)
            for token in sequence.tokens[item.start + 1 : end]:
                self.add(index, token)
        if sequence.sampling.logprobs is not None:
            for token in drawn:
                self.add(index, token)

    def frames(self) -> tuple[bytes, bytes, bytes]:
        """ids, logprobs, ranks: see StepResult."""
        return self._ids.tobytes(), self._logprobs.tobytes(), self._ranks.tobytes()


def wanted_scores(
    items: Sequence[StepItem], sequences: Mapping[int, ToySequence], ids: range
) -> ScoreFrames | None:
    """Empty frames for the scores that a plan's items ask for; None where they ask for none."""
    num_top = -1
    for item in items:
        sequence = sequences.get(item.seq)
        if sequence is None:
            continue
        sampling = sequence.sampling
        if item.num_samples and sampling.logprobs is not None:
            num_top = max(num_top, sampling.logprobs)
        if item.score_prompt:
            num_top = max(num_top, sampling.prompt_logprobs or 0)
    return ScoreFrames(num_top, len(items), ids) if num_top >= 0 else None
