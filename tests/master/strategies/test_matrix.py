"""Every combination of docs/scheduling.md through random workloads: all tokens the oracle's, no
request lost, `check()` after every step, budgets kept; every other combination refused."""

import dataclasses
import itertools
import random

import pytest

from tests.master.test_scheduler_workloads import random_request
from tests.master.toy_instance import ToyInstance
from xllm.config.load import load
from xllm.config.scheduling import COMBINATIONS, FAIRNESS, PREEMPTION, STRATEGIES, SchedulerSettings
from xllm.errors import ConfigError
from xllm.master.strategies.policy import build_policy
from xllm.protocol.step import ItemKind

AXES = list(itertools.product(STRATEGIES, FAIRNESS, PREEMPTION, (0.0, 0.001)))
TENANTS = ("a", "b", "c")


def is_in_table(strategy: str, fairness: str, preemption: str, max_step_ms: float) -> bool:
    row = COMBINATIONS[strategy]
    fits = fairness in row.fairness and preemption in row.preemption
    return fits and (row.cuts_prompts or not max_step_ms)


ALLOWED = [axes for axes in AXES if is_in_table(*axes)]
REFUSED = [axes for axes in AXES if not is_in_table(*axes)]


def test_the_table_leaves_something_on_both_sides():
    assert len(ALLOWED) == 52
    assert len(REFUSED) == 20


@pytest.mark.parametrize("axes", REFUSED)
def test_what_is_not_in_the_table_is_refused_by_name(axes):
    names = ("strategy", "fairness", "preemption", "max_step_ms")
    settings = dataclasses.replace(SchedulerSettings(), **dict(zip(names, axes, strict=True)))
    with pytest.raises(ConfigError) as refusal:
        build_policy(settings)
    assert f"scheduler.strategy={axes[0]}" in refusal.value.message
    wrong = refusal.value.param.removeprefix("scheduler.")
    assert f"scheduler.{wrong}={getattr(settings, wrong)}" in refusal.value.message
    flags = {f"scheduler.{name}": value for name, value in zip(names, axes, strict=True)}
    with pytest.raises(ConfigError):
        load(flags, environ={})


@pytest.mark.parametrize(
    "weights", ["a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=1,a=2", "a=1e9", "a=1e-9"]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match="tenant_weights"):
        build_policy(SchedulerSettings(fairness="tenant", tenant_weights=weights))


def test_weights_without_fairness_are_refused():
    with pytest.raises(ConfigError, match=r"fairness=none"):
        build_policy(SchedulerSettings(tenant_weights="a=1"))


def make_instance(rng: random.Random, axes, depth: int) -> ToyInstance:
    strategy, fairness, preemption, max_step_ms = axes
    return ToyInstance(
        max_in_flight=depth,
        num_blocks=rng.choice([10, 20, 60]),
        block_size=rng.choice([1, 4, 16]),
        max_model_len=rng.choice([24, 60, 200]),
        eos_ids=tuple(rng.sample(range(16, 1000), rng.choice([0, 60]))),
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([3, 16, 64]),
        prefix_cache=rng.random() < 0.8,
        share_prefixes=rng.random() < 0.5,
        strategy=strategy,
        fairness=fairness,
        preemption=preemption,
        max_step_ms=max_step_ms,
        ttft_ms=rng.choice([1, 50, 2000]),
        tpot_ms=rng.choice([1, 20, 200]),
    )


def check_plans(instance: ToyInstance, axes) -> None:
    """Tokens of a step and, where steps are pure, kinds."""
    limit = instance.limits.max_num_batched_tokens
    for plan in instance.plans:
        num_tokens = sum(item.num_tokens for item in plan.items)
        prefills = [item for item in plan.items if item.kind != ItemKind.DECODE]
        if axes[0] == "continuous":
            assert num_tokens <= limit or len(prefills) == 1
        else:
            assert num_tokens <= limit
        if axes[0] in ("prefill-first", "decode-first"):
            assert not prefills or len(prefills) == len(plan.items)
        assert len(plan.items) <= instance.limits.max_running
        assert len({item.seq for item in plan.items}) == len(plan.items)


def run_history(seed: int, axes, depth: int, *, disturb: bool = False) -> ToyInstance:
    rng = random.Random(seed)
    instance = make_instance(rng, axes, depth)
    shared = [rng.randrange(1000) for _ in range(24)]
    disturbed = set()
    for index in range(rng.randrange(4, 14)):
        name = f"r{index}"
        request = random_request(rng, instance, shared)
        request["offline"] = rng.random() < 0.4
        own = {name: rng.choice([0, 0, 1, 100]) for name in ("ttft_ms", "tpot_ms")}
        refusal = instance.admit(name, **request, tenant=rng.choice(TENANTS), **own)
        assert refusal is None or refusal.code == "context_length_exceeded", refusal
        for _ in range(rng.choice([0, 0, 1, 5])):
            instance.step()
        if disturb and rng.random() < 0.4 and instance.requests:
            victim = rng.choice([key[0] for key in instance.requests])
            instance.scheduler.cancel(victim, 1, rng.choice([-1, -1, 0]))
            instance.scheduler.check()
            disturbed.add(victim)
    instance.run()
    for name, attempt in instance.requests:
        if name not in disturbed:
            instance.verify(name, attempt)
    check_plans(instance, axes)
    if axes[0] == "zero-evict":
        stats = instance.scheduler.statistics()
        assert (stats.num_preemptions, stats.num_pauses) == (0, 0)
    return instance


@pytest.mark.parametrize("axes", ALLOWED, ids=lambda axes: "-".join(map(str, axes)))
@pytest.mark.parametrize("depth", [1, 2])
def test_every_combination_gives_the_oracles_tokens(axes, depth):
    for seed in range(6):
        run_history(1000 * depth + seed, axes, depth, disturb=seed % 3 == 2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_zero_evict_never_evicts(depth):
    for seed in range(80):
        run_history(seed, ("zero-evict", "none", "auto", 0.0), depth)
    evicted = 0
    for seed in range(80):
        stats = run_history(seed, ("chunked", "none", "auto", 0.0), depth).scheduler.statistics()
        evicted += stats.num_preemptions
    assert evicted > 20


@pytest.mark.parametrize("preemption", PREEMPTION)
def test_pauses_and_recomputations_happen_where_they_may(preemption):
    pauses = preemptions = 0
    for seed in range(60):
        stats = run_history(seed, ("chunked", "none", preemption, 0.0), 2).scheduler.statistics()
        pauses += stats.num_pauses
        preemptions += stats.num_preemptions
    assert preemptions > 10
    assert (pauses > 5) == (preemption != "recompute"), pauses
