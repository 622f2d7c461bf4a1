"""What is accepted of drafts, and which items that verify some make sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import EngineError
from xllm.protocol.step import ItemKind, ItemOptions, StepItem
from xllm.worker.verifying import check_verify, drafts_of, num_accepted

tokens = st.lists(st.integers(0, 2), max_size=8)


@given(tokens, st.randoms())
def test_a_stream_is_the_same_however_it_is_guessed(drafts, random):
    """A step that draws by any rule of the tokens before gives what single steps give."""
    rule = [[random.randrange(3) for _ in range(3)] for _ in range(9)]

    def draw(before):
        return rule[len(before)][sum(before) % 3]

    singly = []
    for _ in range(len(drafts) + 1):
        singly.append(draw(singly))
    drawn = [draw(drafts[:k]) for k in range(len(drafts) + 1)]
    count = num_accepted(drafts, drawn)
    assert drawn[:count] == singly[:count]
    # As many as can be: the next one stands behind a wrong guess.
    assert 1 <= count <= len(drafts) + 1
    assert count == len(drawn) or drafts[count - 1] != drawn[count - 1]


@given(tokens, st.lists(st.integers(0, 2), max_size=9))
def test_rows_that_could_not_draw_are_left_to_later_steps(drafts, drawn):
    drawn = drawn[: len(drafts) + 1]
    count = num_accepted(drafts, drawn)
    assert count == min(num_accepted(drafts, [*drawn, *[9] * 9]), len(drawn))
    assert bool(count) == bool(drawn)


def verify_item(ids=(5, 6, 7), start=3, kind=ItemKind.VERIFY, **fields) -> StepItem:
    return StepItem(1, kind, start, len(ids), options=ItemOptions(token_ids=ids), **fields)


def test_drafts_are_what_stands_behind_the_last_token():
    assert drafts_of(verify_item()) == (6, 7)
    assert drafts_of(verify_item((5,))) == ()
    assert drafts_of(verify_item(kind=ItemKind.PREFILL)) == ()
    assert drafts_of(StepItem(1, ItemKind.VERIFY, 3, 1)) == ()


@pytest.mark.parametrize(
    ("item", "length", "last", "words"),
    [
        (verify_item(), 4, 5, ""),
        (verify_item((5,)), 4, 5, ""),
        (verify_item(), 5, 5, "it is 5 at 4"),
        (verify_item(), 4, 6, "it is 6 at 3"),
        (verify_item((5, 10)), 4, 5, "of 10 tokens"),
        (verify_item((5, -1)), 4, 5, "of 10 tokens"),
        (verify_item(num_samples=2), 4, 5, "2 samples"),
        (verify_item(num_samples=0), 4, 5, "0 samples"),
        (verify_item(score_prompt=True), 4, 5, "3 token ids"),
        (StepItem(1, ItemKind.VERIFY, 3, 1), 4, 5, "0 token ids"),
    ],
)
def test_items_that_make_no_sense_are_refused(item, length, last, words):
    if not words:
        check_verify(item, length, last, 10)
        return
    with pytest.raises(EngineError, match=words):
        check_verify(item, length, last, 10)
