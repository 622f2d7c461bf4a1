"""Steps and items that fail, results that fit no plan, workers that are lost, on the toy engine."""

import pytest

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.errors import BadMessageError, InvariantError
from xllm.protocol.step import StepResult
from xllm.worker.toy.faults import ToyFaults


def test_a_failed_item_ends_its_request_alone():
    one = ToyInstance(faults=ToyFaults(fail_item=777))
    one.admit("a", [*PROMPT, 777], n=2)
    one.admit("b", PROMPT)
    one.run()
    assert one.ended["a", 1].code == "engine_error"
    one.verify("b")


def test_an_item_that_fails_in_the_middle_of_a_prompt_ends_its_request():
    one = ToyInstance(faults=ToyFaults(fail_item=777), max_num_batched_tokens=8)
    one.admit("a", [*PROMPT[:6], 777, *PROMPT])
    one.step()
    assert one.ended["a", 1].message == "toy fault: the item fails"
    assert one.scheduler.is_idle


def test_an_item_with_too_few_tokens_ends_its_request():
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    plan = one.scheduler.schedule(one.now)
    one.take(one.scheduler.update(StepResult(plan.step, ((5,),)), (), one.now))
    assert one.ended["a", 1].code == "engine_error"
    one.scheduler.check()


def test_what_a_step_gives_a_cancelled_sequence_is_dropped():
    one = ToyInstance()
    one.admit("a", PROMPT)
    one.admit("b", PROMPT)
    plan = one.scheduler.schedule(one.now)
    one.scheduler.cancel("a", 1)
    one.scheduler.check()
    held = one.scheduler.statistics()
    assert held.num_available_blocks == held.num_blocks - 6
    output = one.toy.execute(plan)
    one.take(one.scheduler.update(output.result, output.frames, one.now))
    one.scheduler.check()
    one.run()
    one.verify("b")
    assert ("a", 1, 0) not in one.streams
    assert ("a", 1) not in one.ended


def test_results_that_contradict_the_plan_are_refused():
    one = ToyInstance()
    one.admit("a", PROMPT)
    plan = one.scheduler.schedule(one.now)
    with pytest.raises(BadMessageError, match="1 items and 2 results"):
        one.scheduler.update(StepResult(plan.step, ((1,), (2,))), (), one.now)
    with pytest.raises(BadMessageError, match="logprob rows"):
        short = StepResult(plan.step, ((1,),), num_top=1, logprob_rows=(1,))
        one.scheduler.update(short, (b"", b"", b""), one.now)
    assert not one.scheduler.update(StepResult(99, ((1,),)), (), one.now)
    one.take(one.scheduler.fail_step(plan.step, "engine_error", "nonsense"))
    assert one.ended["a", 1].message == "nonsense"
    one.scheduler.check()
    assert one.scheduler.is_idle


def test_a_lost_worker_ends_everything_once():
    one = ToyInstance(max_num_seqs=2)
    for name in "abc":
        one.admit(name, PROMPT, n=2)
    one.step()
    one.scheduler.schedule(one.now)
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone"))
    one.scheduler.check()
    assert {ended.code for ended in one.ended.values()} == {"unavailable"}
    assert len(one.ended) == 3
    assert one.scheduler.is_idle


def test_who_was_in_the_step_that_a_worker_died_of_is_told_apart():
    one = ToyInstance(max_num_seqs=2)
    for name in "abc":
        one.admit(name, PROMPT)
    one.scheduler.schedule(one.now)
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone", "worker_lost"))
    codes = {name: ended.code for (name, _), ended in one.ended.items()}
    assert codes == {"a": "worker_lost", "b": "worker_lost", "c": "unavailable"}
    assert one.scheduler.is_idle


def test_check_finds_a_leaked_block():
    one = ToyInstance()
    one.admit("a", PROMPT)
    one.step()
    one.scheduler.check()
    next(iter(one.scheduler._state.requests.values())).sequences[0].block_ids.pop()
    with pytest.raises(InvariantError):
        one.scheduler.check()
