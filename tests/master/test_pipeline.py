"""The asynchronous pipeline: plans that build on tokens nobody knows yet, and what becomes of them
when those tokens are the last. On and off the tokens are the same."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.master.test_scheduler_workloads import random_request
from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.master.idleness import IdleMeter
from xllm.protocol.step import ItemKind, StepResult
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.stream import predict


def pipelined(**limits) -> ToyInstance:
    return ToyInstance(**{"max_in_flight": 2, **limits})


def spans(plan) -> list[tuple[int, int]]:
    return [(item.start, item.num_tokens) for item in plan.items]


def first_tokens(prompt, num=8) -> list[int]:
    probe = ToyInstance()
    probe.admit("a", prompt, max_tokens=num)
    probe.run()
    return probe.streams["a", 1, 0].tokens


def test_the_next_step_is_planned_before_the_token_is_known():
    one = pipelined()
    one.admit("a", PROMPT, max_tokens=4)
    assert one.plan()
    assert one.plan()
    assert not one.plan()  # two are under way
    assert spans(one.plans[1]) == [(10, 1)]
    assert one.plans[1].items[0].kind == ItemKind.DECODE
    one.run()
    one.verify("a")
    # As many steps as tokens: nothing is planned past a known end.
    assert len(one.plans) == 4


def test_chunks_of_a_prompt_follow_one_another_without_waiting():
    one = pipelined(max_num_batched_tokens=4)
    one.admit("a", PROMPT, max_tokens=2)
    assert one.plan()
    assert one.plan()
    one.settle()
    assert one.plan()
    assert [spans(plan) for plan in one.plans] == [[(0, 4)], [(4, 4)], [(8, 2)]]
    one.run()
    one.verify("a")


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_step_beyond_the_end_is_dropped(logprobs):
    stop = first_tokens(PROMPT)[2]
    one = pipelined()
    one.admit("a", PROMPT, stop_token_ids=(stop,), logprobs=logprobs)
    while ("a", 1) not in one.ended:
        one.step()
    # Its last step is still under way: the token is out of everything, the blocks are held.
    assert len(one.in_flight) == 1
    stats = one.scheduler.statistics()
    assert stats.num_steps_in_flight == 1
    assert stats.num_available_blocks < stats.num_blocks
    stream = one.streams["a", 1, 0]
    assert stream.tokens[-1] == stop
    assert len(stream.logprobs) == (3 if logprobs else 0)
    one.run()
    one.verify("a")
    assert len(one.plans) == 4
    # The stop token's KV was computed, yet nothing past what was settled is cached.
    assert one.scheduler.statistics().num_cached_blocks == 3
    one.admit("again", PROMPT + stream.tokens, max_tokens=1)
    one.run()
    assert one.ended["again", 1].cached_tokens == 12


def test_blocks_of_a_dropped_step_go_to_nobody_while_it_runs():
    stop = first_tokens(PROMPT)[0]
    one = pipelined(num_blocks=3, block_size=4)
    one.admit("a", PROMPT, stop_token_ids=(stop,), max_tokens=2)
    one.plan()
    one.admit("b", list(range(40, 50)), max_tokens=2)
    one.plan()
    one.settle()
    assert ("a", 1) in one.ended or one.in_flight
    one.run()
    one.verify("a")
    one.verify("b")


def test_a_cancelled_sequence_keeps_its_blocks_until_its_steps_are_settled():
    one = pipelined()
    one.admit("a", PROMPT)
    one.plan()
    one.plan()
    one.scheduler.cancel("a", 1)
    for _ in range(2):
        stats = one.scheduler.statistics()
        assert stats.num_available_blocks < stats.num_blocks
        one.settle()
    stats = one.scheduler.statistics()
    assert stats.num_available_blocks == stats.num_blocks
    assert not one.streams


def test_choices_fork_only_when_their_first_tokens_are_known():
    one = pipelined()
    one.admit("a", PROMPT, n=3, max_tokens=6)
    assert one.plan()
    assert not one.plan()
    one.run()
    one.verify("a")


def test_a_failed_step_takes_the_next_one_of_its_sequences_with_it():
    one = pipelined(faults=ToyFaults(fail_step=777), num_slots=0)
    one.admit("a", [*PROMPT, 777])
    one.plan()
    one.admit("b", PROMPT)
    one.plan()
    assert len(one.plans[1].items) == 2  # a decode of "a" rides in the step after
    one.settle()
    assert one.ended["a", 1].code == "engine_error"
    stats = one.scheduler.statistics()
    assert stats.num_available_blocks == stats.num_blocks - 6
    one.run()
    one.verify("b")
    assert ("a", 1, 0) not in one.streams


def test_a_failed_item_fails_its_next_step_cleanly():
    one = pipelined(faults=ToyFaults(fail_item=777))
    one.admit("a", [*PROMPT, 777])
    one.admit("b", PROMPT)
    one.plan()
    one.plan()
    _, output, _ = one.in_flight[1]
    assert [index for index, _ in output.result.failed] == [0]
    one.run()
    assert one.ended["a", 1].message == "toy fault: the item fails"
    one.verify("b")


def test_a_lost_worker_ends_both_steps():
    one = pipelined(max_num_seqs=2)
    for name in "abc":
        one.admit(name, PROMPT)
    one.plan()
    one.plan()
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone", "worker_lost"))
    one.scheduler.check()
    codes = {name: ended.code for (name, _), ended in one.ended.items()}
    assert codes == {"a": "worker_lost", "b": "worker_lost", "c": "unavailable"}
    assert one.scheduler.is_idle
    stats = one.scheduler.statistics()
    assert stats.num_available_blocks == stats.num_blocks


def test_a_victim_in_flight_sits_out_and_then_gives_way():
    one = pipelined(num_blocks=6, block_size=4, prefix_cache=False)
    one.admit("a", PROMPT[:7], max_tokens=17)
    one.admit("b", PROMPT[:7], max_tokens=17)
    one.run()
    assert one.scheduler.statistics().num_preemptions >= 1
    one.verify("a")
    one.verify("b")
    assert all(item.start + item.num_tokens <= 24 for plan in one.plans for item in plan.items)


@pytest.mark.parametrize("num_blocks", [8, 12, 16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_crowd_in_a_tiny_pool_ends_in_bounded_steps(num_blocks, depth):
    """Every sequence may need the whole pool; whoever waits for blocks gets them in the end."""
    one = ToyInstance(num_blocks=num_blocks, block_size=2, max_in_flight=depth, max_num_seqs=16)
    num, length = 12, 2 * num_blocks - 4
    for index in range(num):
        one.admit(f"r{index}", [index, index + 1, index + 2], max_tokens=length - 3, seed=index)
    one.run(max_steps=12 * num * length)
    for index in range(num):
        one.verify(f"r{index}")


def test_chunks_after_a_failed_one_fail_too():
    """Their KV would have a gap."""
    one = pipelined(faults=ToyFaults(fail_item=777), max_num_batched_tokens=4)
    one.admit("a", [777, *PROMPT])
    one.plan()
    one.plan()
    assert all(output.result.failed for _, output, _ in one.in_flight)
    one.run()
    assert one.ended["a", 1].message == "toy fault: the item fails"


@example(10438, 2)
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((2, 3)))
def test_no_history_of_settling_makes_a_difference(seed, depth):
    """Plans and results in any order that a worker allows, with cancels, faults and deadlines:
    who is left alone gets the oracle's tokens; what others got is its beginning."""
    rng = random.Random(seed)
    one = ToyInstance(
        num_blocks=rng.choice([8, 12, 24, 80]),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=60,
        eos_ids=tuple(rng.sample(range(16, 1000), rng.choice([0, 200]))),
        max_num_seqs=rng.choice([2, 8, 32]),
        max_num_batched_tokens=rng.choice([4, 16, 64]),
        strategy=rng.choice(["chunked", "chunked", "continuous"]),
        prefix_cache=rng.random() < 0.8,
        share_prefixes=rng.random() < 0.8,
        max_in_flight=depth,
        faults=ToyFaults(fail_item=998, fail_step=997 if rng.random() < 0.3 else -1),
    )
    shared = [rng.randrange(997) for _ in range(20)]
    odd: set[str] = set()
    for index in range(rng.randrange(1, 14)):
        name = f"r{index}"
        request = random_request(rng, one, shared)
        if rng.random() < 0.2:
            request["timeout_ms"] = rng.randrange(10, 200)
            odd.add(name)
        one.admit(name, **request)
        for _ in range(rng.randrange(6)):
            if one.in_flight and rng.random() < 0.5:
                one.settle()
            else:
                one.now += 0.01
                one.take(one.scheduler.expire(one.now))
                one.plan()
        if rng.random() < 0.2 and one.requests:
            odd.add(victim := rng.choice(sorted(one.requests))[0])
            one.scheduler.cancel(victim, 1, rng.choice([-1, 0, 1]))
            one.scheduler.check()
    one.run()
    for name, attempt in one.requests:
        if name not in odd and one.ended[name, attempt].code == "":
            one.verify(name, attempt)
    for (name, _, choice), stream in one.streams.items():
        want = one.expected(one.requests[name, 1], choice)
        assert stream.tokens == want.tokens[: len(stream.tokens)]
        if one.requests[name, 1].sampling.logprobs is not None:
            new = stream.tokens[len(stream.tokens) - len(stream.logprobs) :]
            assert [row.token_id for row in stream.logprobs] == new


def test_what_is_drawn_past_the_end_is_what_the_stream_would_go_on_with():
    """The worker's history is what the next step builds on, not the master's."""
    one = pipelined()
    one.admit("a", PROMPT, max_tokens=5)
    one.plan()
    one.plan()
    _, output, _ = one.in_flight[1]
    sampling = one.requests["a", 1].sampling
    assert output.result.tokens == ((predict(PROMPT, sampling, 0, 2, block_size=4)[1],),)


def test_idle_time_counts_only_where_there_was_work():
    meter = IdleMeter()
    for idle_ns, has_work in ((5, True), (7, False), (1000, True), (11, True)):
        meter.note(StepResult(1, duration_ns=100, idle_ns=idle_ns), has_work)
    assert (meter.busy_ns, meter.idle_ns) == (400, 18)
