"""Guessed tokens, verified several a step: streams, ends and accounts are those without."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.oracle_drafts import OracleDrafts
from tests.master.test_scheduler_workloads import DEPTHS, run_workload
from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.config.scheduling import STRATEGIES
from xllm.errors import EngineError
from xllm.protocol.step import ItemKind, StepResult

VERIFY = ItemKind.VERIFY


def drafting(**limits) -> ToyInstance:
    """An instance whose guesses are all right."""
    block_size = limits.setdefault("block_size", 4)
    return ToyInstance(proposer=OracleDrafts(1, block_size, wrong=0, silent=0), **limits)


def verified(instance) -> list:
    return [item for plan in instance.plans for item in plan.items if item.kind == VERIFY]


def drafted_workload(seed: int, *, disturb: bool, depth: int) -> ToyInstance:
    # The first number that a workload draws is its block size.
    block_size = random.Random(seed).choice([1, 2, 4, 8])
    proposer = OracleDrafts(seed, block_size)
    instance = run_workload(seed, disturb=disturb, max_in_flight=depth, proposer=proposer)
    assert instance.limits.block_size == block_size
    return instance


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(DEPTHS))
def test_streams_with_drafts_are_the_oracles(seed, depth):
    drafted_workload(seed, disturb=False, depth=depth)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(DEPTHS))
def test_cancels_among_drafts_harm_nobody_else(seed, depth):
    drafted_workload(seed, disturb=True, depth=depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_workloads_verify_what_they_are_for(depth):
    """Drafts are taken and refused, beside prompts and decodes, where blocks are short."""
    names = ("accepted", "refused", "mixed", "ahead", "preempted", "stopped", "scored", "forked")
    counts = dict.fromkeys(names, 0)
    for seed in range(70):
        instance = drafted_workload(seed, disturb=False, depth=depth)
        stats = instance.scheduler.statistics()
        counts["accepted"] += stats.num_accepted_drafts
        counts["refused"] += stats.num_drafts - stats.num_accepted_drafts
        drafted = {item.seq for item in verified(instance)}
        for plan in instance.plans:
            kinds = {item.kind for item in plan.items}
            counts["mixed"] += len(kinds) == 3
            counts["ahead"] += VERIFY in kinds and len(kinds) > 1
        if not drafted:
            continue
        counts["preempted"] += stats.num_preemptions
        for (name, _, _), stream in instance.streams.items():
            sampling = instance.requests[name, 1].sampling
            counts["stopped"] += stream.reason == "stop"
            counts["scored"] += bool(stream.logprobs)
            counts["forked"] += sampling.n > 1
    assert counts.pop("mixed") > 0
    assert min(counts.values()) > 10, counts


def test_a_right_guess_gives_several_tokens_in_one_step():
    one = drafting(draft_tokens=4)
    one.admit("a", PROMPT, max_tokens=11)
    one.run()
    one.verify("a")
    # One token from the prompt, two steps of five.
    assert [item.num_tokens for item in verified(one)] == [5, 5]
    assert len(one.plans) == 3
    stats = one.scheduler.statistics()
    assert (stats.num_drafts, stats.num_accepted_drafts) == (8, 8)


def test_no_draft_goes_past_the_end():
    one = drafting(draft_tokens=15)
    for count in range(1, 9):
        one.admit(f"r{count}", PROMPT, max_tokens=count)
        one.run()
        one.verify(f"r{count}")
    # The last token is drawn beside the drafts: with two left there is one.
    assert [item.num_tokens for item in verified(one)] == list(range(2, 8))


def test_a_stop_id_inside_a_run_ends_it_there():
    plain = ToyInstance()
    plain.admit("a", PROMPT, max_tokens=8)
    plain.run()
    tokens = plain.streams["a", 1, 0].tokens
    one = drafting(draft_tokens=8)
    one.admit("a", PROMPT, max_tokens=20, stop_token_ids=(tokens[3],), logprobs=0)
    one.run()
    one.verify("a")
    stream = one.streams["a", 1, 0]
    assert (stream.tokens, stream.reason, stream.stop_id) == (tokens[:4], "stop", tokens[3])
    assert [row.token_id for row in stream.logprobs] == tokens[:4]
    assert verified(one)[0].num_tokens == 9


def test_only_accepted_tokens_are_hashed():
    """Guesses that are all wrong leave the cache as it is without them."""
    caches = []
    for proposer in (None, OracleDrafts(1, 4, wrong=1, silent=0)):
        one = ToyInstance(proposer=proposer)
        one.admit("a", PROMPT, max_tokens=30)
        one.run()
        one.verify("a")
        caches.append((one.scheduler.cached_blocks, len(one.plans)))
    assert verified(one)
    assert caches[0] == caches[1]
    one.admit("b", [*PROMPT, *one.streams["a", 1, 0].tokens], max_tokens=4)
    one.run()
    one.verify("b")
    assert one.ended["b", 1].cached_tokens > len(PROMPT)


def test_nothing_is_planned_behind_drafts_that_are_under_way():
    one = drafting(max_in_flight=2, draft_tokens=3)
    one.admit("a", PROMPT, max_tokens=30)
    one.plan()
    # Its first token is not known yet, and then it can be guessed on: it waits for it.
    assert not one.plan()
    one.settle()
    assert one.plan()
    assert [item.kind for item in one.plans[-1].items] == [VERIFY]
    assert not one.plan()
    one.admit("b", PROMPT[::-1], max_tokens=3)
    assert one.plan()
    assert [item.kind for item in one.plans[-1].items] == [ItemKind.PREFILL]
    one.run()
    one.verify("a")
    one.verify("b")


def test_who_is_not_guessed_is_planned_ahead_beside_drafts():
    class OnlyOne(OracleDrafts):
        def propose(self, seq, most):
            return super().propose(seq, most) if seq.request_id == "a" else ()

    one = ToyInstance(proposer=OnlyOne(1, 4, wrong=0, silent=0), max_in_flight=2)
    for name in ("a", "b"):
        one.admit(name, PROMPT if name == "a" else PROMPT[::-1], max_tokens=30)
    one.step()
    most = 0
    while one.step():
        most = max(most, len(one.in_flight))
    assert most == 1  # beside the step that was just settled
    one.verify("a")
    one.verify("b")
    numbers = {item.seq for item in verified(one)}
    assert len(numbers) == 1
    behind = [plan for plan in one.plans if {i.kind for i in plan.items} == {ItemKind.DECODE}]
    assert behind


def test_drafts_leave_half_of_a_step_and_take_no_block_from_anybody():
    one = drafting(draft_tokens=15, max_num_batched_tokens=16, max_num_seqs=4)
    for name in "abcd":
        one.admit(name, [ord(name), *PROMPT], max_tokens=40, priority=ord(name))
    one.run()
    for name in "abcd":
        one.verify(name)
    for plan in one.plans:
        drafts = sum(item.num_tokens - 1 for item in plan.items if item.kind == VERIFY)
        assert drafts <= (16 - sum(item.kind != ItemKind.PREFILL for item in plan.items)) // 2
        assert sum(item.num_tokens for item in plan.items) <= 16
    short = drafting(draft_tokens=15, num_blocks=11, num_slots=0)
    plain = ToyInstance(num_blocks=11, num_slots=0)
    for instance in (short, plain):
        for name in "ab":
            instance.admit(name, [ord(name), *PROMPT], max_tokens=9)
        instance.run()
    assert plain.scheduler.statistics().num_preemptions == 0
    assert short.scheduler.statistics().num_preemptions == 0
    assert verified(short)


@pytest.mark.parametrize("drawn", [(6, 7), (5, 7, 8, 9)])
def test_tokens_that_do_not_follow_the_drafts_end_their_request(drawn):
    one = ToyInstance()
    one.scheduler._state.policy.drafts = type(
        "Fixed", (), {"propose": lambda self, seq, most: (5, 7)}
    )()
    one.admit("a", PROMPT)
    one.step()
    plan = one.scheduler.schedule(one.now)
    one.take(one.scheduler.update(StepResult(plan.step, (drawn,)), (), one.now))
    assert one.ended["a", 1].code == EngineError.code
    one.scheduler.check()


def test_drafts_that_spoil_a_step_are_asked_no_more():
    one = drafting()
    one.admit("a", PROMPT, max_tokens=6)
    one.step()
    plan = one.scheduler.schedule(one.now)
    assert plan.items[0].kind == VERIFY
    one.take(one.scheduler.update(StepResult(plan.step, ((),)), (), one.now))
    one.scheduler.check()
    item = one.scheduler.schedule(one.now).items[0]
    assert (item.kind, item.start, item.num_tokens) == (ItemKind.DECODE, plan.items[0].start, 1)
    assert one.scheduler.statistics().num_accepted_drafts == 0


def test_tenants_pay_for_all_tokens():
    counts = []
    for more in ({}, {"proposer": OracleDrafts(1, 4, wrong=0, silent=0)}):
        one = ToyInstance(fairness="tenant", **more)
        one.admit("a", PROMPT, max_tokens=12, tenant="t")
        one.run()
        counts.append(one.scheduler._state.policy.counters.count("t"))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_prompt_lookup_changes_no_stream(depth):
    one = ToyInstance(drafting="prompt-lookup", draft_tokens=3, max_in_flight=depth)
    for index in range(6):
        one.admit(f"r{index}", PROMPT * 3, max_tokens=20, seed=index, n=1 + index % 2)
    one.run()
    for index in range(6):
        one.verify(f"r{index}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drafts_go_with_every_strategy(strategy):
    one = drafting(strategy=strategy, num_blocks=40, max_in_flight=2, max_num_batched_tokens=24)
    for index in range(6):
        one.admit(f"r{index}", [*PROMPT, index], max_tokens=20, seed=index, offline=index % 2 > 0)
        one.step()
    one.run()
    for index in range(6):
        one.verify(f"r{index}")
    assert one.scheduler.statistics().num_accepted_drafts > 20
