"""Random workloads through the scheduler and the toy engine, against the engine's oracle.

Tiny pools force preemption, small budgets force chunks, shared prefixes force hits; requests
fork, are cancelled, resumed, replaced and expire. Every stream that ended by itself must be the
oracle's, every page must read back right, and nothing may leak.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance

DEPTHS = (1, 2, 3)
"""Steps in flight: 1 without, 2 with the asynchronous pipeline; 3 is never configured, but what
holds for 2 by accident may not hold for 3."""


def random_instance(rng: random.Random, max_in_flight: int, proposer=None) -> ToyInstance:
    block_size, max_model_len = rng.choice([1, 2, 4, 8]), rng.choice([24, 60, 200])
    fewest_mappings = -(-max_model_len // block_size) + 2
    return ToyInstance(
        proposer=proposer,
        max_in_flight=max_in_flight,
        num_blocks=rng.choice([6, 10, 20, 60]),
        block_size=block_size,
        max_model_len=max_model_len,
        num_slots=rng.choice([0, 1, 4, 40]),
        max_mappings=fewest_mappings + rng.choice([0, 5, 2000]),
        eos_ids=tuple(rng.sample(range(16, 1000), rng.choice([0, 60]))),
        max_num_seqs=rng.choice([1, 3, 8, 32]),
        max_num_batched_tokens=rng.choice([3, 8, 16, 64]),
        strategy=rng.choice(["chunked", "chunked", "continuous"]),
        prefix_cache=rng.random() < 0.8,
        share_prefixes=rng.random() < 0.8,
    )


def random_request(rng: random.Random, instance: ToyInstance, shared: list[int]) -> dict:
    prompt = shared[: rng.randrange(len(shared))] + [
        rng.randrange(1000) for _ in range(rng.randrange(1, 10))
    ]
    n = rng.choice([1, 1, 1, 2, 4])
    options = {
        "n": n,
        "max_tokens": rng.choice([None, 0, 1, 2, 7, 20]),
        "min_tokens": rng.choice([0, 0, 3]),
        "seed": rng.randrange(1 << 30),
        "priority": rng.choice([0, 0, 1]),
        "offline": rng.random() < 0.2,
        "logprobs": rng.choice([None, None, 0, 2]),
        "prompt_logprobs": rng.choice([None, None, None, 1]),
        "stop_token_ids": tuple(rng.sample(range(16, 1000), rng.choice([0, 30]))),
        "ignore_eos": rng.random() < 0.3,
    }
    if rng.random() < 0.2:
        options["outputs"] = [
            [rng.randrange(16, 1000) for _ in range(rng.randrange(4))]
            for _ in range(rng.randrange(n + 1))
        ]
    return {"prompt": prompt, **options}


def run_workload(seed: int, *, disturb: bool, max_in_flight: int = 1, proposer=None) -> ToyInstance:
    rng = random.Random(seed)
    instance = random_instance(rng, max_in_flight, proposer)
    shared = [rng.randrange(1000) for _ in range(24)]
    disturbed: set[str] = set()
    refused = 0
    for index in range(rng.randrange(1, 16)):
        name = f"r{index}"
        request = random_request(rng, instance, shared)
        refusal = instance.admit(name, **request)
        if refusal is not None:
            assert refusal.code == "context_length_exceeded", refusal
            refused += 1
        for _ in range(rng.choice([0, 0, 1, 5])):
            instance.step()
        if disturb and rng.random() < 0.4 and instance.requests:
            victim = rng.choice([key[0] for key in instance.requests])
            instance.scheduler.cancel(victim, 1, rng.choice([-1, -1, 0, 1]))
            instance.scheduler.check()
            disturbed.add(victim)
    instance.run()
    for name, attempt in instance.requests:
        if name not in disturbed:
            instance.verify(name, attempt)
    for (name, _, choice), stream in instance.streams.items():
        want = instance.expected(instance.requests[name, 1], choice)
        assert stream.tokens == want.tokens[: len(stream.tokens)]
        if not instance.requests[name, 1].sampling.logprobs:
            continue
        new = stream.tokens[len(stream.tokens) - len(stream.logprobs) :]
        assert [row.token_id for row in stream.logprobs] == new
        assert all(len(row.top_ids) == 2 for row in stream.logprobs)
    return instance


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(DEPTHS))
def test_undisturbed_streams_are_the_oracles(seed, depth):
    run_workload(seed, disturb=False, max_in_flight=depth)


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(DEPTHS))
def test_cancels_harm_nobody_else(seed, depth):
    run_workload(seed, disturb=True, max_in_flight=depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_workloads_reach_what_they_are_for(depth):
    """Preemptions, forks with copies, evictions, hits and chunks happen in them, many times."""
    counts = dict.fromkeys(("preempt", "copy", "evict", "hit", "chunk", "scores"), 0)
    for seed in range(150):
        instance = run_workload(seed, disturb=False, max_in_flight=depth)
        stats = instance.scheduler.statistics()
        counts["preempt"] += stats.num_preemptions
        counts["evict"] += stats.num_evictions
        counts["copy"] += sum(len(plan.copies) for plan in instance.plans)
        counts["hit"] += sum(ended.cached_tokens > 0 for ended in instance.ended.values())
        counts["scores"] += len(instance.scores)
        counts["chunk"] += sum(
            item.num_samples == 0 for plan in instance.plans for item in plan.items
        )
    assert min(counts.values()) > 20, counts


@pytest.mark.parametrize("strategy", ["chunked", "continuous"])
def test_scores_cover_the_prompt_once(strategy):
    instance = ToyInstance(max_num_batched_tokens=8, strategy=strategy)
    prompt = list(range(20, 41))
    instance.admit("warm", prompt, max_tokens=1)
    instance.run()
    instance.admit("a", prompt, max_tokens=2, prompt_logprobs=2)
    instance.admit("b", prompt, max_tokens=0, prompt_logprobs=0, n=2)
    instance.run()
    for name, width in (("a", 2), ("b", 0)):
        scores = instance.scores[name]
        assert sorted(scores) == list(range(1, len(prompt)))
        assert [scores[k].token_id for k in sorted(scores)] == prompt[1:]
        assert all(len(row.top_ids) == width for row in scores.values())
        instance.verify(name)
    assert instance.ended["a", 1].cached_tokens == 0
