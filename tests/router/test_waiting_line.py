"""The line of requests that wait for room."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm.router.admission.waiting_line import SPARE_TENANTS, Waiter, WaitingLine


def waiter(name: str, tenant: str = "t", **more) -> Waiter:
    fields = {"online": True, "priority": 0, "cost": 10, "deadline": 100.0, **more}
    return Waiter(name, tenant, **fields)


def order(line: WaitingLine) -> list[str]:
    names = []
    while len(line):
        names.append(line.pop().request_id)
        line.check()
    return names


def test_online_before_offline_and_priority_before_time():
    line = WaitingLine(10)
    line.push(waiter("offline", online=False, priority=9))
    line.push(waiter("first"))
    line.push(waiter("urgent", priority=1))
    line.push(waiter("second"))
    assert order(line) == ["urgent", "first", "second", "offline"]


def test_tenants_take_turns_by_what_they_had():
    line = WaitingLine(100)
    for k in range(10):
        line.push(waiter(f"a{k}", "a"))
    line.push(waiter("b0", "b"))
    line.push(waiter("b1", "b", cost=40))
    line.push(waiter("b2", "b"))
    names = order(line)
    assert names[:5] == ["a0", "b0", "a1", "b1", "a2"]
    assert names.index("b2") == 8  # a long prompt counts as four turns


def test_a_pause_saves_nothing_up():
    line = WaitingLine(100)
    line.push(waiter("b", "b"))
    line.pop()
    for k in range(50):
        line.push(waiter(f"a{k}", "a"))
    for _ in range(40):
        line.pop()
    for k in range(10):
        line.push(waiter(f"b{k}", "b"))
    first = [line.pop().tenant for _ in range(10)]
    assert 4 <= first.count("b") <= 6


def test_a_full_line_sends_offline_away_first_then_the_lowest_priority():
    line = WaitingLine(3)
    for one in (waiter("off", online=False), waiter("low", priority=-1), waiter("plain")):
        assert line.push(one) is None
    assert line.push(waiter("1", priority=1)).request_id == "off"
    assert line.push(waiter("2")).request_id == "low"
    assert line.push(waiter("3", online=False)).request_id == "3"
    assert line.push(waiter("4", priority=-1)).request_id == "4"
    line.check()


def test_among_equals_the_greediest_tenants_newest_goes():
    line = WaitingLine(4)
    for k in range(3):
        line.push(waiter(f"a{k}", "a"))
    line.push(waiter("b0", "b"))
    assert line.push(waiter("b1", "b")).request_id == "a2"
    assert line.push(waiter("a3", "a")).request_id == "a3"


def test_who_will_be_sent_away_is_known_before():
    line = WaitingLine(2)
    assert not line.turns_away((False, -5), "a")
    line.push(waiter("1", "a"))
    line.push(waiter("2", "a"))
    assert line.turns_away((False, 9), "b"), "offline"
    assert line.turns_away((True, 0), "a")
    assert not line.turns_away((True, 0), "b"), "the tenant with the most waiting gives way"
    assert not line.turns_away((True, 1), "a")
    assert WaitingLine(0).turns_away((True, 9), "a")


def test_a_line_of_no_size_takes_nobody():
    line = WaitingLine(0)
    assert line.push(waiter("x")).request_id == "x"
    assert line.head() is None


def test_tenants_that_come_and_go_are_forgotten():
    line = WaitingLine(10)
    line.push(waiter("stays", "stays", priority=-1))
    for k in range(5000):
        line.push(waiter(f"{k}", f"tenant{k}"))
        assert line.pop().request_id == f"{k}"
        assert len(line._had) <= 2 * len(line) + SPARE_TENANTS + 2
    assert len(line) == 1


class LineMachine(RuleBasedStateMachine):
    """Against a list: who is there, who goes first by rank, who is late, who is sent away."""

    def __init__(self) -> None:
        super().__init__()
        self.line = WaitingLine(6)
        self.model: dict[str, Waiter] = {}
        self.count = 0
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        online=st.booleans(),
        priority=st.integers(-1, 1),
        cost=st.integers(1, 50),
        patience=st.floats(0, 5),
    )
    def push(self, tenant, online, priority, cost, patience):
        self.count += 1
        one = Waiter(str(self.count), tenant, online, priority, cost, self.now + patience)
        self.model[one.request_id] = one
        foreseen = self.line.turns_away(one.rank, tenant)
        last = self.line.push(one)
        assert not foreseen or last is one
        if last is one and not foreseen:
            counts = Counter(w.tenant for w in self.model.values() if w.rank == one.rank)
            first, second = counts.most_common(2)
            assert first[1] == second[1], "only where it is a matter of order"
        if last is not None:
            del self.model[last.request_id]
            assert all(last.rank <= other.rank for other in self.model.values())
        else:
            assert len(self.model) <= 6

    @precondition(lambda self: self.model)
    @rule()
    def pop(self):
        one = self.line.pop()
        assert one.rank == max(other.rank for other in self.model.values())
        same = [w for w in self.model.values() if (w.rank, w.tenant) == (one.rank, one.tenant)]
        assert same[0] is one
        del self.model[one.request_id]

    @rule(index=st.integers(0, 10))
    def remove(self, index):
        names = list(self.model)
        name = names[index] if index < len(names) else "nobody"
        assert self.line.remove(name) == (name in self.model)
        self.model.pop(name, None)

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds):
        self.now += seconds
        late = {one.request_id for one in self.line.expire(self.now)}
        assert late == {name for name, one in self.model.items() if one.deadline <= self.now}
        for name in late:
            del self.model[name]

    @invariant()
    def the_same_wait(self):
        self.line.check()
        assert len(self.line) == len(self.model)
        assert all(name in self.line for name in self.model)


LineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLine = LineMachine.TestCase
