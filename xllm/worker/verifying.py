"""Items that verify drafts: what makes sense of one, and how many of its tokens count.

Such an item has a row for its sequence's last token and one for each draft behind it. Row k draws
what follows k drafts, at that position and with that position's noise: just what a step of its own
would draw there, if those drafts are what the rows before it drew. So a draft is accepted while it
is equal, and a stream is the same with drafts and without, greedy or sampled. Pure.

Where a draft makes numbers that are not finite even rows before it may have none: it is masked, but
nothing times NaN is NaN. Then the item gives no token, and is asked again without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.errors import EngineError
from xllm.protocol.step import ItemKind, StepItem


def drafts_of(item: StepItem) -> tuple[int, ...]:
    """The drafts that an item verifies; none for other items."""
    if item.kind != ItemKind.VERIFY or item.options is None:
        return ()
    return item.options.token_ids[1:]


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of `drawn`, the tokens of an item's rows from the first on, belong to its sequence:
    those whose drafts before them were drawn. They may be fewer than rows, where a row could not
    draw, or none: what is lacking is drawn by a later step. At least one where there is one."""
    for count, (draft, token) in enumerate(zip(drafts, drawn, strict=False), 1):
        if draft != token:
            return count
    return len(drawn)


def check_verify(item: StepItem, length: int, last: int, vocab_size: int) -> None:
    """Raise EngineError unless `item`, whose options were checked, verifies drafts behind the
    `last` of a sequence's `length` tokens, ids of a vocabulary."""
    name = f"sequence {item.seq}"
    ids = item.options.token_ids if item.options is not None else ()
    if not ids or item.num_samples != 1 or item.score_prompt:
        raise EngineError(f"{name}: verified with {len(ids)} token ids, {item.num_samples} samples")
    if item.start != length - 1 or ids[0] != last:
        raise EngineError(
            f"{name}: verified from token {ids[0]} at {item.start}, it is {last} at {length - 1}"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise EngineError(f"{name}: drafts {min(ids)} to {max(ids)} of {vocab_size} tokens")
