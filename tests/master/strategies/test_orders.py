"""The queues: nobody lost, the right one next, the bounds that docs/scheduling.md states."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.master.queue import WaitingQueue
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.strategies.deadlines import TokenDeadlines, UrgencyQueue
from xllm.master.strategies.fairness import OUTPUT_WEIGHT, FairQueue, TokenCounters, bound
from xllm.master.strategies.phases import (
    DECODE_STREAK,
    PREFILL_STREAK,
    MixedSteps,
    StepKind,
    decode_first,
    prefill_first,
)
from xllm.master.strategies.step_model import StepTimeModel
from xllm.master.strategies.urgency import Urgency, classify, may_wait, rank, step_limit_s, weight
from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams


def make(arrival: int, now: float = 0.0, prompt: int = 4, **fields) -> Sequence:
    message = AdmitRequest(
        f"r{arrival}", 1, "toy", tuple(range(prompt)), SamplingParams(), **fields
    )
    request = RequestState(message, arrival, now, 100, frozenset(), (), b"", [])
    return Sequence(request, 0, [], [])


def queues():
    return (WaitingQueue(), FairQueue(), UrgencyQueue(TokenDeadlines(2.0, 0.2, StepTimeModel())))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 1, 2]))
def test_no_queue_loses_or_doubles_anybody(seed, which):
    """Equal tenants, priorities and deadlines too; gone ones are skipped."""
    rng = random.Random(seed)
    queue = queues()[which]
    waiting: dict[int, Sequence] = {}
    for arrival in range(1, 150):
        seq = make(
            arrival,
            tenant=rng.choice("ab"),
            priority=rng.choice([0, 0, 1]),
            offline=rng.random() < 0.3,
        )
        queue.push(seq)
        waiting[arrival] = seq
        while waiting and rng.random() < 0.5:
            if rng.random() < 0.3:
                gone = waiting.pop(rng.choice(list(waiting)))
                gone.state = SequencePhase.FINISHED
                queue.note_gone(gone)
                continue
            first = queue.peek(now=rng.uniform(0, 10))
            assert queue.pop() is first
            if rng.random() < 0.3:
                queue.put_back(first)
                continue
            first.state = SequencePhase.RUNNING
            assert waiting.pop(first.key[2]) is first
        assert len(queue) == len(waiting)
        assert {id(seq) for seq in queue} == {id(seq) for seq in waiting.values()}
    for _ in range(len(waiting)):
        first = queue.peek(20.0)
        assert queue.pop() is first
        first.state = SequencePhase.RUNNING
        del waiting[first.key[2]]
    assert queue.peek(20.0) is None
    assert not waiting


@pytest.mark.parametrize("which", [0, 1, 2])
def test_online_goes_before_offline_everywhere(which):
    queue = queues()[which]
    queue.push(make(1, tenant="a", offline=True, priority=9))
    queue.push(make(2, tenant="b"))
    queue.push(make(3, tenant="a"))
    order = []
    while (seq := queue.peek(100.0)) is not None:
        queue.pop()
        order.append(seq.key[2])
    assert order == [2, 3, 1]


def test_priorities_are_among_a_tenants_own():
    queue = FairQueue()
    queue.counters.charge("a", 10, 0)
    for arrival, tenant, priority in ((1, "b", 0), (2, "a", 5), (3, "b", 1)):
        queue.push(make(arrival, tenant=tenant, priority=priority))
    queue.counters.charge("a", 10, 0)
    assert queue.peek(0.0).key[2] == 3


def test_a_look_does_not_cost_a_turn():
    queue = FairQueue()
    queue.push(make(1, tenant="a"))
    queue.push(make(2, tenant="b"))
    queue.counters.charge("b", 50, 0)
    first = queue.peek(0.0)
    assert first.key[2] == 1
    queue.put_back(queue.pop())
    assert queue.counters.count("a") == 0.0


def test_a_tenant_that_comes_back_is_lifted_and_not_lowered():
    counters = TokenCounters({"heavy": 2.0})
    counters.charge("a", 100, 0)
    counters.charge("b", 0, 100)
    counters.arrive("new", iter(["a", "b"]))
    assert counters.count("new") == 100.0
    counters.arrive("b", iter(["a"]))
    assert counters.count("b") == 200.0
    counters.leave("a")
    counters.arrive("late", iter([]))
    assert counters.count("late") == 100.0
    counters.charge("heavy", 100, 0)
    assert counters.count("heavy") == 50.0


def test_counters_of_tenants_long_gone_are_forgotten():
    queue = FairQueue()
    for arrival in range(3000):
        queue.push(make(arrival, tenant=f"t{arrival}"))
        queue.peek(0.0)
        queue.pop().state = SequencePhase.RUNNING
    assert len(queue.counters._counts) < 1100


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30))
def test_tenants_that_always_wait_get_alike(seed):
    """A model of a server with `seats` decoding sequences; three tenants never run dry."""
    rng = random.Random(seed)
    queue = FairQueue()
    longest, output, seats = 64, rng.choice([1, 8, 32]), rng.choice([1, 3, 8])
    lengths = {"a": 1, "b": longest, "c": rng.randrange(1, longest)}
    arrival = 0
    running: list[list] = []
    for _ in range(300):
        for tenant in lengths:
            while queue._num_live.get(tenant, 0) < seats + 1:
                arrival += 1
                queue.push(make(arrival, tenant=tenant))
        while len(running) < seats:  # fewer than wait of any tenant
            tenant = queue.peek(0.0).request.message.tenant
            queue.pop().state = SequencePhase.RUNNING
            queue.counters.charge(tenant, lengths[tenant], 0)
            running.append([tenant, rng.randrange(1, output + 1)])
        for one in running:
            queue.counters.charge(one[0], 0, 1)
            one[1] -= 1
        running = [one for one in running if one[1]]
        counts = [queue.counters.count(tenant) for tenant in lengths]
        assert max(counts) - min(counts) <= bound(longest, seats * (longest + output))
    assert OUTPUT_WEIGHT == 2.0


def test_classes_and_what_orders_them():
    assert classify(10.0, 2.0, 12.5, 0.0) is Urgency.STARVED
    assert classify(10.0, 2.0, 11.5, 0.0) is Urgency.URGENT
    assert classify(10.0, 2.0, 9.5, 1.0) is Urgency.URGENT
    assert classify(10.0, 2.0, 5.0, 1.0) is Urgency.NORMAL
    starved = rank((False, 0, 5, 0), 1.0, 1.0, 9.0, 20.0, 1.0)
    dense = rank((False, -1, 6, 0), 19.0, 2.0, 1.0, 20.0, 1.0)
    sparse = rank((False, 0, 1, 0), 19.0, 2.0, 1.0, 20.0, 1.0)
    later = rank((False, 0, 2, 0), 90.0, 2.0, 1.0, 20.0, 1.0)
    offline = rank((True, -9, 0, 0), 0.0, 2.0, 1.0, 20.0, 1.0)
    assert sorted([offline, later, sparse, dense, starved]) == [
        starved, dense, sparse, later, offline,
    ]  # fmt: skip
    assert weight(1) == 2 * weight(0)
    assert 0 < weight(-(1 << 31)) < weight(1 << 31) < float("inf")


def test_steps_are_cut_for_decodes_in_time_but_not_to_nothing():
    assert step_limit_s([0.5, 0.3, -4.0], 0.2) == 0.3
    assert step_limit_s([0.001], 0.2) == pytest.approx(0.13)
    assert step_limit_s([-1.0], 0.2) == pytest.approx(0.13)
    assert may_wait(0.5, 0.2)
    assert not may_wait(0.4, 0.2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_who_is_late_by_an_objective_is_overtaken_by_no_later_deadline(seed):
    """An overloaded server that starts one request a tick while two come."""
    rng = random.Random(seed)
    objectives = TokenDeadlines(1.0, 0.1, StepTimeModel())
    queue = UrgencyQueue(objectives)
    arrival = 0
    for tick in range(120):
        now = tick * 0.05
        for _ in range(2):
            arrival += 1
            fields = {"ttft_ms": rng.choice([0, 100, 3000]), "priority": rng.choice([0, 0, 8])}
            queue.push(make(arrival, now, prompt=rng.choice([1, 2000]), **fields))
        objectives.look([], queue, 0)
        chosen = queue.peek(now)
        queue.pop().state = SequencePhase.RUNNING
        due = objectives.deadline(chosen)
        for seq in queue:
            late = now - objectives.deadline(seq) > objectives.objective_s(seq)
            assert not late or objectives.deadline(seq) >= due


@pytest.mark.parametrize(
    ("phases", "preferred", "streak"),
    [
        (prefill_first(), StepKind.PREFILL, PREFILL_STREAK),
        (decode_first(), StepKind.DECODE, DECODE_STREAK),
    ],
)
def test_pure_steps_let_the_other_kind_wait_so_long(phases, preferred, streak):
    assert phases.choose(False, True) is StepKind.PREFILL
    assert phases.choose(True, False) is StepKind.DECODE
    kinds = []
    for _ in range(3 * (streak + 1)):
        kind = phases.choose(True, True)
        phases.note(kind, others_wait=True)
        kinds.append(kind)
    turn = [preferred] * streak
    assert [kind is preferred for kind in kinds] == ([True] * len(turn) + [False]) * 3
    # A turn that could not be used is offered again.
    for _ in range(streak):
        phases.note(preferred, others_wait=True)
    assert phases.choose(True, True) is not preferred
    phases.note(preferred, others_wait=True)
    assert phases.choose(True, True) is not preferred


def test_mixed_steps_are_mixed():
    assert {MixedSteps().choose(a, b) for a in (0, 1) for b in (0, 1)} == {StepKind.MIXED}
