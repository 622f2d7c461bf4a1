"""Several choices of one request, on the toy engine: forked, aborted, resumed, each on its own."""

import pytest

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.worker.toy.stream import predict


def test_choices_are_drawn_from_one_row_and_copy_the_partial_block():
    one = ToyInstance(block_size=4)
    one.admit("a", PROMPT, n=3, max_tokens=6)
    one.run()
    one.verify("a")
    assert one.plans[0].items[0].num_samples == 3
    assert len(one.plans[1].copies) == 2
    source = one.plans[0].new[0].block_ids[2]
    assert {copy[0] for copy in one.plans[1].copies} == {source}
    forks = one.plans[1].new
    assert [new.parent for new in forks] == [1, 1]
    assert {new.block_ids[:2] for new in forks} == {one.plans[0].new[0].block_ids[:2]}
    assert all(not new.prompt_ids and len(new.output_ids) == 1 for new in forks)
    assert len({tuple(s.tokens) for s in one.streams.values()}) == 3


def test_choices_without_a_seat_are_computed_on_their_own():
    one = ToyInstance(max_num_seqs=2)
    one.admit("a", PROMPT, n=5, max_tokens=6)
    one.run()
    one.verify("a")


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_aborting_one_choice_leaves_the_others(choice, steps):
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    for _ in range(steps):
        one.step()
    one.scheduler.cancel("a", 1, choice)
    one.scheduler.cancel("a", 1, choice)
    one.scheduler.check()
    one.run()
    one.verify("a", choices=[1 - choice])
    got = one.streams.get(("a", 1, choice))
    assert (len(got.tokens) if got else 0) == steps


def test_the_request_ends_with_its_last_choice_aborted():
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    one.step()
    one.scheduler.cancel("a", 1, 0)
    one.scheduler.cancel("a", 1, 1)
    one.run()
    assert one.ended["a", 1].code == ""


def test_a_leader_that_ends_with_its_first_token_leaves_its_forks():
    sampling = {"seed": 7, "n": 3, "max_tokens": 6}
    one = ToyInstance()
    one.admit("probe", PROMPT, **sampling)
    request = one.requests["probe", 1]
    first = predict(PROMPT, request.sampling, 0, 1, block_size=4)[0]
    one.admit("a", PROMPT, stop_token_ids=(first,), **sampling)
    one.run()
    one.verify("a")
    assert one.streams["a", 1, 0].reason == "stop"
    assert one.streams["a", 1, 0].stop_id == first
    for plan in one.plans:
        assert not {new.parent for new in plan.new} & set(plan.ended)


def test_resumed_choices_go_on_where_they_were():
    one = ToyInstance()
    one.admit("whole", PROMPT, n=3, max_tokens=9)
    one.run()
    whole = [one.streams["whole", 1, choice].tokens for choice in range(3)]
    one.admit("a", PROMPT, n=3, max_tokens=9, outputs=[whole[0][:4], [], whole[2]])
    one.run()
    one.verify("a")
    assert [one.streams["a", 1, choice].tokens for choice in range(3)] == whole
