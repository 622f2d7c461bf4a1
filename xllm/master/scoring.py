"""Logprob rows against the plan that they answer: enough of them, and which are the prompt's."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from xllm.errors import BadMessageError
from xllm.master.lifecycle import InstanceState, StepInFlight
from xllm.master.logprobs import LogprobFrames
from xllm.master.sequence import Sequence, SequencePhase
from xllm.protocol.instance import PromptScores
from xllm.protocol.step import StepItem, StepResult


def read_rows(
    step: StepInFlight,
    result: StepResult,
    frames: AbstractSequence[bytes],
    failed: dict[int, str] | None,
) -> LogprobFrames | None:
    """The step's logprobs, if it has any; BadMessageError, before anything is settled, where an
    item that goes on has fewer rows than will be read. `failed`: items that did not run."""
    rows = None
    if result.num_top >= 0:
        rows = LogprobFrames(result, frames, len(step.sequences))
    for index, (seq, item) in enumerate(zip(step.sequences, step.plan.items, strict=True)):
        if seq.state is not SequencePhase.RUNNING or (failed and index in failed):
            continue
        needed = len(result.tokens[index]) if seq.request.sampling.logprobs is not None else 0
        if item.score_prompt:
            needed += max(0, _last_scored(seq, item) - item.start - 1)
        num_rows = rows.num_rows(index) if rows is not None else 0
        if num_rows < needed:
            raise BadMessageError(
                f"step {result.step}: item {index} has {num_rows} logprob rows and needs {needed}"
            )
    return rows


def report_scores(
    state: InstanceState, seq: Sequence, item: StepItem, index: int, rows: LogprobFrames
) -> None:
    """Scores of the prompt tokens that the item's rows predict, each position once."""
    request = seq.request
    first = item.start + 1
    last = _last_scored(seq, item)
    begin = max(first, request.num_scored)
    wanted = request.sampling.prompt_logprobs or 0
    if begin >= last:
        return
    scores = tuple(rows.read(index, position - first, wanted) for position in range(begin, last))
    request.num_scored = last
    state.outcome.prompt_scores.append(
        PromptScores(request.request_id, request.attempt, begin, scores)
    )


def _last_scored(seq: Sequence, item: StepItem) -> int:
    """One past the last prompt position whose token an item's rows predict."""
    return min(item.start + item.num_tokens + 1, seq.num_prompt)
