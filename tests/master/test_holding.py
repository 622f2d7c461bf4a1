"""Requests that are only prefilled here: first tokens, the hold, and its ends."""

import asyncio
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.test_master_actor import stage
from tests.master.test_scheduler_workloads import DEPTHS, random_instance, random_request
from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.master.scheduler import Scheduler
from xllm.protocol.instance import AdmitRequest, PrefillDone, ReleaseHold
from xllm.protocol.sampling import SamplingParams

STAGES = (("prefill", "here"), ("decode", "there"))


def instance(**limits) -> ToyInstance:
    return ToyInstance(instance="here", **limits)


def available(one: ToyInstance) -> int:
    return one.scheduler.statistics().num_available_blocks


def test_a_prefill_gives_its_first_token_and_keeps_its_blocks():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES)
    assert one.step()
    assert not one.step()
    [done] = one.prefilled
    assert (done.request_id, done.attempt, done.num_tokens) == ("a", 1, len(PROMPT))
    assert done.hold_ms == 10_000
    stream = one.streams["a", 1, 0]
    assert stream.tokens == one.expected(one.requests["a", 1], 0).tokens[:1]
    assert not stream.reason
    assert one.scheduler.statistics().num_held == 1
    assert one.scheduler.statistics().num_running == 0
    assert available(one) == one.limits.num_blocks - 3


def test_a_release_makes_the_blocks_cached_ones():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES)
    one.step()
    assert not one.scheduler.release_hold("a", 2)
    assert not one.scheduler.release_hold("b", 1)
    assert one.scheduler.release_hold("a", 1)
    assert not one.scheduler.release_hold("a", 1)
    one.scheduler.check()
    stats = one.scheduler.statistics()
    assert (stats.num_held, stats.num_requests) == (0, 0)
    assert stats.num_cached_blocks == 2
    one.run()
    assert not one.ended


def test_a_hold_that_nobody_takes_ends_with_a_word():
    one = instance(hold_s=5.0)
    one.admit("a", PROMPT, stages=STAGES)
    one.step()
    assert one.scheduler.next_deadline == one.now + 5.0
    one.now += 4.9
    one.step()
    assert not one.ended
    one.now += 0.2
    one.step()
    assert one.ended["a", 1].code == "unavailable"
    one.run()


def test_decoding_here_after_all_finds_the_blocks():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES)
    one.step()
    one.admit("a", PROMPT, attempt=2, outputs=[one.streams["a", 1, 0].tokens])
    one.run()
    one.verify("a", 2)
    assert one.ended["a", 2].cached_tokens == 8


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (("both", "here"),),
        (("prefill", "there"), ("decode", "here")),
        (("prefill", "here"), ("decode", "here")),
    ],
)
def test_other_routes_are_decoded_here(stages):
    one = instance()
    one.admit("a", PROMPT, stages=stages)
    one.run()
    one.verify("a")
    assert not one.prefilled


def test_a_request_that_ends_with_its_first_token_is_not_held():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES, max_tokens=1)
    first = instance()
    first.admit("a", PROMPT, stages=STAGES)
    first.step()
    stop = first.streams["a", 1, 0].tokens[0]
    one.admit("b", PROMPT, stages=STAGES, stop_token_ids=(stop,))
    one.run()
    one.verify("a")
    assert one.streams["b", 1, 0].reason == "stop"
    assert not one.prefilled


def test_each_choice_gets_its_first_token_and_one_word_says_so():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES, n=3, logprobs=1)
    one.step()
    for choice in range(3):
        stream = one.streams["a", 1, choice]
        assert stream.tokens == one.expected(one.requests["a", 1], choice).tokens[:1]
        assert len(stream.logprobs) == 1
    assert len(one.prefilled) == 1
    one.scheduler.cancel("a", 1, 0)
    one.scheduler.cancel("a", 1, 2)
    one.scheduler.check()
    assert one.scheduler.statistics().num_held == 1
    one.scheduler.cancel("a", 1, 1)
    one.run()


def test_choices_that_resume_are_held_one_by_one_and_told_once():
    one = instance(max_num_batched_tokens=16)
    one.admit("a", PROMPT, stages=STAGES, n=2, outputs=[[5, 6], [7]])
    while one.step():
        pass
    assert len(one.prefilled) == 1
    assert one.prefilled[0].num_tokens == 12
    assert one.scheduler.statistics().num_held == 2
    assert one.scheduler.release_hold("a", 1)
    one.run()


def test_choices_that_wait_for_each_others_blocks_do_not_wait_for_ever():
    one = instance(num_blocks=8, hold_s=1.0, prefix_cache=False)
    one.admit("a", range(20, 40), stages=STAGES, n=2, outputs=[[5], [6]])
    one.step()
    assert one.scheduler.statistics().num_held == 1
    assert not one.step()
    assert not one.prefilled
    one.now += 1.0
    one.step()
    assert one.ended["a", 1].code == "unavailable"
    one.run()


def test_held_blocks_are_not_taken_and_others_wait_for_them():
    one = instance(num_blocks=8, hold_s=1.0)
    one.admit("a", range(20, 40), stages=STAGES)
    one.step()
    one.admit("b", range(100, 120))
    assert not one.step()
    one.now += 1.0
    assert one.step()
    one.run()
    one.verify("b")


def test_a_lost_worker_and_a_deadline_end_holds():
    one = instance()
    one.admit("a", PROMPT, stages=STAGES)
    one.admit("b", PROMPT, stages=STAGES, timeout_ms=1000)
    one.step()
    assert one.scheduler.statistics().num_held == 2
    one.now += 1.1
    one.step()
    assert one.ended["b", 1].code == "deadline_exceeded"
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone", "worker_lost"))
    assert one.ended["a", 1].code == "unavailable"
    one.scheduler.check()
    assert one.scheduler.is_idle


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(DEPTHS))
def test_holds_harm_nobody_and_leak_nothing(seed, depth):
    rng = random.Random(seed)
    one = random_instance(rng, depth)
    one.limits = dataclasses.replace(one.limits, instance="here", hold_s=1.0)
    one.scheduler = Scheduler(one.limits)
    shared = [rng.randrange(1000) for _ in range(24)]
    held = set()
    for index in range(rng.randrange(1, 12)):
        name = f"r{index}"
        prefill_only = rng.random() < 0.5
        stages = STAGES if prefill_only else ()
        refusal = one.admit(name, **random_request(rng, one, shared), stages=stages)
        if refusal is None and prefill_only:
            held.add(name)
        for _ in range(rng.choice([0, 1, 4])):
            one.step()
        if held and rng.random() < 0.4:
            one.scheduler.release_hold(rng.choice(sorted(held)), 1)
            one.scheduler.check()
    for _ in range(3000):
        if not one.step():
            one.now += 0.5
        if not one.scheduler.num_requests:
            break
    one.run()
    for name, attempt in one.requests:
        if name not in held:
            one.verify(name, attempt)
    for (name, attempt, choice), stream in one.streams.items():
        want = one.expected(one.requests[name, attempt], choice)
        assert stream.tokens == want.tokens[: len(stream.tokens)]


def test_a_router_hears_of_the_prefill_and_releases_it(run_dir):
    async def scenario():
        async with stage(run_dir) as one:
            request = AdmitRequest(
                "a", 1, "toy", tuple(PROMPT), SamplingParams(max_tokens=8, seed=7),
                stages=(("prefill", "i0"), ("decode", "")),
            )  # fmt: skip
            one.router.send(request)
            done = await one.router.answer(PrefillDone)
            assert (done.request_id, done.num_tokens) == ("a", len(PROMPT))
            assert len(one.router.streams["a", 1, 0].tokens) == 1
            assert one.master.models[0].steps.num_open == 1
            one.router.send(ReleaseHold("a", 1))
            await one.router.until(lambda: one.master.models[0].steps.num_open == 0)
            assert len(one.master.models[0].conversation.routes) == 0
            assert not one.router.ended

    asyncio.run(scenario())
