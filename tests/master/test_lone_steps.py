"""Requests that share no step: alone in every strategy, beside others that go on, until they have
passed where they were."""

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.strategies.test_matrix import ALLOWED, TENANTS, make_instance
from tests.master.test_scheduler_workloads import DEPTHS, random_request
from tests.master.toy_instance import ToyInstance
from xllm.master.metrics import MasterMetrics
from xllm.master.plan_pump import PlanPump
from xllm.master.step_loop import StepLoop
from xllm.protocol.instance import PASSED_TOKENS

LONG = {"max_tokens": 40}


def in_steps(instance: ToyInstance) -> list[set[str]]:
    """The requests of each step in flight, oldest first."""
    steps = instance.scheduler._state.steps.values()
    return [{seq.request_id for seq in (*step.sequences, *step.forked)} for step in steps]


def runs_alone(instance: ToyInstance, name: str) -> bool:
    return name in instance.scheduler._state.lone


def steps_of(instance: ToyInstance) -> list[str]:
    """One step after the other to the end: the requests in each, by the names' letters."""
    found = []
    while True:
        instance.take(instance.scheduler.expire(instance.now))
        while instance.plan():
            pass
        steps = in_steps(instance)
        if not steps:
            return found
        lone = [name for name in instance.scheduler._state.lone if {name} in steps]
        assert len(steps) == 1 or not lone  # nothing is under way with it
        found.append("".join(sorted(steps[0])))
        instance.settle()


def run_history(seed: int, axes, depth: int, *, disturb: bool) -> tuple[ToyInstance, int]:
    """A random workload with requests that run alone; `check` sees to it that they do. And how
    many steps were theirs."""
    rng = random.Random(seed)
    instance = make_instance(rng, axes, depth)
    shared = [rng.randrange(1000) for _ in range(24)]
    disturbed = set()
    lone = instance.scheduler._state.lone
    alone = []
    plan = instance.plan

    def watched_plan() -> bool:
        made = plan()
        alone.extend(names for names in in_steps(instance)[-1:] if made and names <= set(lone))
        return made

    instance.plan = watched_plan
    for index in range(rng.randrange(4, 14)):
        name = f"r{index}"
        request = random_request(rng, instance, shared)
        request["offline"] = rng.random() < 0.3
        request["alone"] = rng.random() < 0.5
        refusal = instance.admit(name, **request, tenant=rng.choice(TENANTS))
        assert refusal is None or refusal.code == "context_length_exceeded", refusal
        for _ in range(rng.choice([0, 0, 1, 5])):
            instance.step()
        if disturb and rng.random() < 0.4 and instance.requests:
            victim = rng.choice([key[0] for key in instance.requests])
            instance.scheduler.cancel(victim, 1, rng.choice([-1, -1, 0]))
            instance.scheduler.check()
            disturbed.add(victim)
    instance.run()
    assert not instance.scheduler._state.lone
    for name, attempt in instance.requests:
        if name not in disturbed:
            instance.verify(name, attempt)
    return instance, len(alone)


@pytest.mark.parametrize("axes", ALLOWED, ids=lambda axes: "-".join(map(str, axes)))
def test_in_every_strategy_they_are_alone_and_all_answers_are_the_oracles(axes):
    run_history(1002, axes, 2, disturb=False)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(ALLOWED), st.sampled_from(DEPTHS), st.booleans())
def test_any_workload_with_them_ends(seed, axes, depth, disturb):
    run_history(seed, axes, depth, disturb=disturb)


def test_the_workloads_reach_what_they_are_for():
    """Preemptions, forks, chunks and pauses happen beside steps of one request."""
    counts = dict.fromkeys(("alone", "preempt", "pause", "fork", "chunk"), 0)
    for seed in range(40):
        instance, num_alone = run_history(seed, ("chunked", "none", "auto", 0.0), 2, disturb=False)
        stats = instance.scheduler.statistics()
        counts["alone"] += num_alone
        counts["preempt"] += stats.num_preemptions
        counts["pause"] += stats.num_pauses
        counts["fork"] += sum(new.parent >= 0 for plan in instance.plans for new in plan.new)
        counts["chunk"] += sum(
            item.num_samples == 0 for plan in instance.plans for item in plan.items
        )
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("depth", [1, 2])
def test_others_have_every_second_step_and_they_go_one_after_the_other(depth):
    one = ToyInstance(max_in_flight=depth)
    for name in "xy":
        one.admit(name, [1, 2, 3], max_tokens=60)
    one.step()
    for name in "abc":
        one.admit(name, [ord(name), 2, 3], **LONG, alone=True)
    order = steps_of(one)
    alone = [at for at, names in enumerate(order) if names in ("a", "b", "c")]
    assert "".join(order[at] for at in alone) == "aabbcc"
    assert all(later - sooner >= 2 for sooner, later in itertools.pairwise(alone))
    shared = order[alone[-1] + 1 :]
    assert "abcxy" in shared
    for name in "xyabc":
        one.verify(name)


def test_what_came_with_tokens_must_draw_as_many_more():
    one = ToyInstance()
    one.admit("a", [1, 2, 3], alone=True, outputs=[[7, 8, 9]], **LONG)
    one.admit("x", [1, 2, 4], **LONG)
    for _ in range(20):
        one.step()
        stream = one.streams.get(("a", 1, 0))
        if stream is not None and len(stream.tokens) < 3 + PASSED_TOKENS:
            assert runs_alone(one, "a")
        if not runs_alone(one, "a"):
            break
    assert len(one.streams["a", 1, 0].tokens) >= 3 + PASSED_TOKENS
    one.run()
    one.verify("a")


def test_each_choice_must_pass():
    one = ToyInstance(max_in_flight=2)
    one.admit("x", [5, 6], **LONG)
    one.admit("a", [1, 2, 3], n=3, alone=True, **LONG)
    while runs_alone(one, "a") or ("a", 1, 2) not in one.streams:
        assert one.step()
    counts = [len(one.streams["a", 1, choice].tokens) for choice in range(3)]
    assert min(counts) >= PASSED_TOKENS
    one.run()
    one.verify("a")
    one.verify("x")


def test_a_long_prompt_is_alone_in_all_its_chunks_and_others_have_steps_between():
    one = ToyInstance(max_in_flight=2, max_num_batched_tokens=8)
    one.admit("x", [5, 6], max_tokens=60)
    one.step()
    one.admit("a", list(range(60)), alone=True, max_tokens=4)
    order = steps_of(one)
    until = max(at for at, names in enumerate(order) if names == "a")
    assert order[: until + 1].count("a") >= 60 // 8
    assert "ax" not in order[:until]
    assert order[: until + 1].count("x") >= order[: until + 1].count("a") - 1
    one.verify("a")
    one.verify("x")


def test_while_it_is_under_way_nothing_is_planned_even_if_nobody_wants_it_any_more():
    one = ToyInstance(max_in_flight=2)
    one.admit("a", [1, 2, 3], alone=True, **LONG)
    assert one.plan()
    assert in_steps(one) == [{"a"}]
    one.admit("x", [5, 6], **LONG)
    one.scheduler.cancel("a", 1)
    assert not one.plan()
    assert one.scheduler.is_apart
    one.settle()
    assert not one.scheduler.is_apart
    assert one.plan()
    assert in_steps(one) == [{"x"}]
    one.settle()
    one.run()


def test_no_step_begins_while_another_model_has_one():
    one = ToyInstance()
    one.admit("a", [1, 2, 3], alone=True)
    assert one.scheduler.schedule(one.now, False) is None
    assert one.scheduler.is_apart
    assert one.plan()
    one.settle()
    one.run()
    assert not one.scheduler.is_apart


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_seat_it_holds_back_what_waits(is_offline):
    """Else newcomers would take each seat that is given up."""
    one = ToyInstance(max_num_seqs=2)
    for name in ("x", "y"):
        one.admit(name, [5, 6], max_tokens=10, offline=is_offline)
    one.step()
    one.admit("a", [1, 2, 3], alone=True, offline=is_offline, max_tokens=4)
    for index in range(4):
        one.admit(f"z{index}", [7, index], offline=is_offline, max_tokens=10)
    one.run()
    ends = list(one.ended)
    assert ends.index(("a", 1)) <= 2
    for name, attempt in ends:
        one.verify(name, attempt)


def test_an_online_one_takes_the_seat_of_an_offline_one():
    one = ToyInstance(max_num_seqs=1, preemption="recompute")
    one.admit("x", [5, 6], max_tokens=60, offline=True)
    one.step()
    one.admit("a", [1, 2, 3], alone=True, max_tokens=4)
    one.run()
    assert list(one.ended) == [("a", 1), ("x", 1)]
    assert one.scheduler.statistics().num_preemptions > 0
    one.verify("x")


def test_what_waits_alone_counts_among_what_waits():
    one = ToyInstance(max_waiting=2)
    for name in "ab":
        assert one.admit(name, [1, 2], alone=True) is None
    assert one.scheduler.statistics().num_waiting == 2
    assert one.admit("c", [1, 2]).code == "overloaded"
    assert one.scheduler.quiet_steps() == 0
    one.run()


def test_a_failed_step_of_one_request_is_nobody_elses():
    one = ToyInstance(max_in_flight=2)
    one.admit("x", [5, 6], **LONG)
    one.step()
    one.admit("a", [1, 2, 3], alone=True)
    while in_steps(one) != [{"a"}]:
        while one.plan():
            pass
        if in_steps(one) != [{"a"}]:
            one.settle()
    assert one.scheduler.num_in_steps == 1
    one.in_flight.clear()
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone", "worker_lost"))
    assert {name: ended.code for (name, _), ended in one.ended.items()} == {
        "a": "worker_lost",
        "x": "unavailable",
    }


class Models:
    """Two models at one worker: their loops, and the plans under way with whose they are."""

    def __init__(self, rng: random.Random) -> None:
        self.instances = {
            name: ToyInstance(max_in_flight=2, max_num_batched_tokens=rng.choice([5, 64]))
            for name in ("one", "two")
        }
        self.under_way: list[str] = []
        self.num_alone = 0
        self.pump = PlanPump(tuple(self.instances), 2, lambda plan: None, self.fail)
        for name, instance in self.instances.items():
            loop = StepLoop(name, self.pump, instance.take, self.fail, MasterMetrics())
            self.pump.loops[name] = loop
            loop.begin(instance.scheduler)
            loop.plan = self.watched(name, loop.plan)

    def fail(self, error: Exception) -> None:
        raise error

    def watched(self, name, plan):
        def planned(now, is_clear):
            made = plan(now, is_clear)
            if made is not None:
                instance = self.instances[name]
                instance.in_flight.append((made, instance.toy.execute(made), ""))
                self.under_way.append(name)
                self.look()
            return made

        return planned

    def look(self) -> None:
        lone = [
            names
            for instance in self.instances.values()
            for names in in_steps(instance)
            if any(runs_alone(instance, one) for one in names)
        ]
        self.num_alone += len(lone)
        assert not lone or (len(self.under_way) == 1 and len(lone[0]) == 1)

    def step(self) -> bool:
        self.pump._pump()
        if not self.under_way:
            return False
        name = self.under_way.pop(0)
        _, output, _ = self.instances[name].in_flight.popleft()
        self.pump.loops[name].settle(output.result, output.frames)
        self.instances[name].scheduler.check()
        return True


@pytest.mark.parametrize("seed", range(6))
def test_nothing_of_another_model_is_under_way_with_them(seed):
    async def scenario():
        rng = random.Random(seed)
        models = Models(rng)
        for index in range(12):
            instance = rng.choice(list(models.instances.values()))
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 20))]
            options = {"alone": rng.random() < 0.5, "n": rng.choice([1, 3])}
            instance.admit(f"r{index}", prompt, max_tokens=rng.randrange(3, 30), **options)
            for _ in range(rng.choice([0, 1, 4])):
                models.step()
        while models.step():
            pass
        assert models.num_alone > 1
        for instance in models.instances.values():
            for name, _ in instance.requests:
                instance.verify(name)

    asyncio.run(scenario())
