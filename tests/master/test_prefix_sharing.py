"""Sequences that wait for a prefix which another one is computing: what that saves, and that
nobody waits for ever."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance
from xllm.master.prefix_sharing import MAX_PASSED
from xllm.protocol.step import ItemKind
from xllm.worker.toy.faults import ToyFaults

PREFIX = [random.Random(5).randrange(900) for _ in range(768)]


def prefix_instance(**limits) -> ToyInstance:
    bounds = {
        "num_blocks": 400,
        "block_size": 16,
        "max_model_len": 2000,
        "max_num_batched_tokens": 2048,
        "max_in_flight": 2,
        "share_prefixes": True,
        "num_slots": 40,
    }
    return ToyInstance(**{**bounds, **limits})


def admit_sharers(one: ToyInstance, num: int, **options) -> None:
    for index in range(num):
        own = [900 + index] * 32
        one.admit(f"r{index}", PREFIX + own, max_tokens=4, **options)


def num_prefilled(one: ToyInstance) -> int:
    return sum(
        item.num_tokens
        for plan in one.plans
        for item in plan.items
        if item.kind == ItemKind.PREFILL
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [100, 512, 2048])
def test_a_shared_prefix_is_computed_once(depth, budget):
    one = prefix_instance(max_in_flight=depth, max_num_batched_tokens=budget)
    admit_sharers(one, 24)
    one.run()
    assert num_prefilled(one) == 768 + 24 * 32
    for index in range(24):
        one.verify(f"r{index}")


@pytest.mark.parametrize("switch", ["share_prefixes", "prefix_cache"])
def test_switched_off_nobody_waits(switch):
    one = prefix_instance(max_num_batched_tokens=24 * 800, num_blocks=1400, **{switch: False})
    admit_sharers(one, 24)
    one.plan()
    assert len(one.plans[0].items) == 24
    one.run()
    assert num_prefilled(one) == 24 * 800


def test_others_pass_who_waits_but_only_so_many():
    one = prefix_instance(max_num_batched_tokens=128, num_blocks=2000, max_num_seqs=256)
    one.admit("leader", [*PREFIX, 1], max_tokens=1)
    one.step()
    one.admit("follower", [*PREFIX, 2], max_tokens=1)
    for index in range(2 * MAX_PASSED):
        one.admit(f"other{index}", [index % 900, 7, 8], max_tokens=1)
    follower = one.scheduler._state.requests["follower"].sequences[0]
    most = 0
    while ("follower", 1) not in one.ended:
        one.step()
        most = max(most, follower.num_passed)
    assert 0 < most <= MAX_PASSED
    one.run()
    assert one.ended["follower", 1].cached_tokens == 768


def test_a_bounded_number_passes_a_follower_of_a_slow_leader():
    # The leader's prompt takes 96 steps of 8 tokens; each lets a few others in.
    one = prefix_instance(max_num_batched_tokens=16, num_blocks=2000, max_num_seqs=8)
    one.admit("busy", [3, 4, 5], max_tokens=500)
    one.admit("leader", [*PREFIX, 1], max_tokens=1)
    one.step()
    one.step()
    one.admit("follower", [*PREFIX, 2], max_tokens=1)
    for index in range(200):
        one.admit(f"other{index}", [index, 7, 8], max_tokens=1)
    follower = one.scheduler._state.requests["follower"].sequences[0]
    while follower.num_tokens == 769 and ("follower", 1) not in one.ended:
        one.step()
        assert follower.num_passed <= MAX_PASSED
    one.run()
    for name in ("leader", "follower", "busy", "other199"):
        one.verify(name)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", ["cancel", "fail item", "fail step", "expire"])
def test_a_leader_that_goes_frees_its_followers(how, depth):
    faults = {
        "fail item": ToyFaults(fail_item=777),
        "fail step": ToyFaults(fail_step=777),
    }
    one = prefix_instance(
        max_num_batched_tokens=128, max_in_flight=depth, faults=faults.get(how, ToyFaults())
    )
    timeout = {"timeout_ms": 25} if how == "expire" else {}
    one.admit("leader", [*PREFIX[:400], 777, *PREFIX], max_tokens=1, **timeout)
    one.step()
    for index in range(3):
        one.admit(f"r{index}", [*PREFIX[:400], index, *PREFIX[:40]], max_tokens=3)
    one.step()
    assert not any(name.startswith("r") for name, _, _ in one.streams)
    if how == "cancel":
        one.scheduler.cancel("leader", 1)
    one.run()
    assert ("leader", 1, 0) not in one.streams
    for index in range(3):
        one.verify(f"r{index}")


def test_a_leader_that_is_preempted_frees_its_followers():
    one = prefix_instance(num_blocks=52, max_num_batched_tokens=64)
    one.admit("leader", [*PREFIX, 1], max_tokens=2, offline=True)
    one.step()
    one.admit("follower", [*PREFIX, 2], max_tokens=2)
    one.admit("online", list(range(300)), max_tokens=20, priority=3)
    one.run()
    assert one.scheduler.statistics().num_preemptions > 0
    for name in ("leader", "follower", "online"):
        one.verify(name)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((1, 2)))
def test_trees_of_prefixes_are_computed_right_and_nobody_starves(seed, depth):
    """Prompts that branch at random places, with cancels, in pools of all sizes."""
    rng = random.Random(seed)
    one = ToyInstance(
        num_blocks=rng.choice([16, 30, 200]),
        block_size=rng.choice([2, 4]),
        max_model_len=60,
        max_num_seqs=rng.choice([2, 8, 32]),
        max_num_batched_tokens=rng.choice([4, 16, 64]),
        strategy=rng.choice(["chunked", "chunked", "continuous"]),
        max_in_flight=depth,
        share_prefixes=True,
    )
    trunk = [rng.randrange(900) for _ in range(40)]
    cancelled = set()
    for index in range(rng.randrange(2, 24)):
        prompt = trunk[: rng.choice([0, 3, 12, 25, 40])]
        prompt += [rng.choice([1, 2])] * rng.randrange(1, 12)
        offline = rng.random() < 0.2
        refusal = one.admit(
            f"r{index}", prompt, max_tokens=rng.randrange(1, 8), offline=offline, seed=index
        )
        assert refusal is None or refusal.code == "context_length_exceeded"
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            one.step()
        if rng.random() < 0.2 and one.requests:
            victim = rng.choice(sorted(one.requests))[0]
            one.scheduler.cancel(victim, 1)
            cancelled.add(victim)
    one.run()
    for name, attempt in one.requests:
        if name not in cancelled:
            one.verify(name, attempt)
