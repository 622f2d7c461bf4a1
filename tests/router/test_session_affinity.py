"""Sessions: who stays where, when they leave, and how few move."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.router.policy_questions import BLOCK, chosen, instance, policy
from xllm.router.policies.question import RouteFigures, RouteQuestion
from xllm.router.policies.session_affinity import rendezvous


def test_a_session_stays_while_its_instance_is_there():
    figures = RouteFigures()
    one = policy("least-load", figures)
    candidates = [instance(f"i{k}") for k in range(5)]
    ask = RouteQuestion(10, BLOCK, session="talk 1", tenant="t")
    home = chosen(one, candidates, ask)
    assert {chosen(one, candidates, ask) for _ in range(9)} == {home}
    assert figures.chosen == {"session": 10}
    others = [each for each in candidates if each.name != home]
    second = chosen(one, others, ask)
    assert {chosen(one, others, ask) for _ in range(9)} == {second}
    assert chosen(one, candidates, ask) == home


def test_a_session_leaves_an_instance_that_is_overrun():
    figures = RouteFigures()
    one = policy("least-load", figures, guard_requests=4)
    candidates = [instance(f"i{k}") for k in range(3)]
    ask = RouteQuestion(10, BLOCK, session="s")
    home = chosen(one, candidates, ask)
    next(each for each in candidates if each.name == home).num_inflight = 50
    assert chosen(one, candidates, ask) != home
    assert (figures.num_yields, figures.chosen["load"]) == (1, 1)


def test_sessions_can_be_turned_off():
    one = policy("least-load", sessions="none")
    candidates = [instance(f"i{k}") for k in range(3)]
    ask = RouteQuestion(10, BLOCK, session="s")
    assert len({chosen(one, candidates, ask) for _ in range(3)}) == 3


def test_tenants_do_not_share_sessions():
    names = [f"i{k}" for k in range(16)]
    homes = {rendezvous(names, f"t{k}", "s") for k in range(64)}
    assert len(homes) > 8
    assert rendezvous(names, "ab", "c") != rendezvous(names, "a", "bc")


@pytest.mark.parametrize("num", [2, 5, 8, 32])
def test_few_sessions_move_when_an_instance_joins_or_leaves(num):
    names = [f"instance-{k}" for k in range(num)]
    sessions = [f"s{k}" for k in range(2000)]
    before = {session: rendezvous(names, "t", session) for session in sessions}
    joined = {session: rendezvous([*names, "new"], "t", session) for session in sessions}
    moved = [session for session in sessions if joined[session] != before[session]]
    assert all(joined[session] == "new" for session in moved)
    assert len(moved) <= 2000 / (num + 1) * 1.5
    left = {session: rendezvous(names[1:], "t", session) for session in sessions}
    moved = [session for session in sessions if left[session] != before[session]]
    assert all(before[session] == names[0] for session in moved)
    assert max(Counter(before.values()).values()) <= 2000 / num * 1.5
