"""A word cut at a border: nothing of it is lost, and its end stays at its end."""

from __future__ import annotations

import msgspec
import pytest

from xllm.protocol.instance import TokenItem
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.state.cutting import cut_at

SCORES = tuple(TokenLogprobs(id, -float(id), 0) for id in (11, 12, 13))
ITEM = TokenItem("request", 1, 2, 5, (11, 12, 13), "stop", 13, logprobs=SCORES)


@pytest.mark.parametrize(("border", "num_first"), [(0, 0), (5, 0), (6, 1), (7, 2), (8, 3), (9, 3)])
def test_both_parts_are_the_whole(border, num_first):
    first, rest = cut_at(ITEM, border)
    assert (first.token_ids, rest.token_ids) == ((11, 12, 13)[:num_first], (11, 12, 13)[num_first:])
    assert (first.logprobs, rest.logprobs) == (SCORES[:num_first], SCORES[num_first:])
    assert (first.first_index, rest.first_index) == (5, 5 + num_first)
    assert (first.finish_reason, first.stop_id) == ("", -1)
    assert (rest.finish_reason, rest.stop_id) == ("stop", 13)
    assert {(part.request_id, part.choice, part.attempt) for part in (first, rest)} == {
        ("request", 1, 2)
    }


def test_a_word_without_scores_has_none_in_either_part():
    parts = cut_at(msgspec.structs.replace(ITEM, logprobs=None), 6)
    assert [part.logprobs for part in parts] == [None, None]
