"""What a sequence keeps of the tokens that a step with drafts gave it. Pure.

The worker gives what was drawn up to the first draft that was wrong, or nothing where the drafts
spoilt the step. A sequence keeps it up to its own end, which only the master knows: a stop id in
the middle, or its length.
"""

from __future__ import annotations

from xllm.master.sequence import Sequence
from xllm.protocol.step import StepItem


def contradicts(item: StepItem, drawn: tuple[int, ...]) -> bool:
    """Whether this cannot be what came of an item that verifies drafts: tokens behind a draft that
    was not drawn."""
    assert item.options is not None
    drafts = item.options.token_ids[1:]
    return drafts[: max(0, len(drawn) - 1)] != drawn[:-1]


def take_drawn(seq: Sequence, drawn: tuple[int, ...]) -> tuple[int, ...]:
    """Append what the sequence keeps of `drawn`: all up to its end. Its KV is computed for all its
    tokens but the last one then; what lies behind is written over by later steps. Where nothing was
    drawn it has no drafts any more."""
    seq.may_draft = bool(drawn)
    count = 0
    for token in drawn:
        seq.output.append(token)
        seq.num_tokens += 1
        count += 1
        if seq.finish_reason():
            break
    seq.num_drafts = 0
    seq.num_computed = seq.num_planned = seq.num_tokens - 1
    return drawn[:count]
