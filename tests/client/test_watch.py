"""When a router counts as gone: what was heard, for how long nothing was, and who else there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm.client.retries import (
    FIRST_TRY_S,
    LONGEST_TRY_S,
    RETRIES_PER_S,
    RETRY_BURST,
    RetryBudget,
    is_paced,
    try_time,
)
from xllm.client.watch import RouterWatch, Verdict


def watch(num_routers=2) -> RouterWatch:
    made = RouterWatch(5.0, 1.0)
    made.num_routers = num_routers
    made.opened(0.0)
    made.rested(0.0)
    return made


def first(verdict, made, connected, until=60.0) -> float:
    """When it says so, if nothing is ever heard; 0: never."""
    now = 0.0
    while now < until:
        now += 0.02
        said = made.tick(now, connected=connected, heard=False, waiting=True)
        if said is verdict:
            return round(now, 1)
        if said is Verdict.NEXT:
            made.opened(0.0)
    return 0.0


def test_a_silent_router_is_pinged_then_left():
    assert first(Verdict.PING, watch(), True) == 0.3
    assert first(Verdict.NEXT, watch(), True) == 1.0


def test_the_only_router_is_pinged_and_never_left_for_its_silence():
    assert first(Verdict.PING, watch(1), True) == 0.3
    assert first(Verdict.NEXT, watch(1), True) == 0.0
    assert first(Verdict.GIVE_UP, watch(1), True) == 0.0


def test_a_router_that_is_not_there():
    assert first(Verdict.NEXT, watch(), False) == FIRST_TRY_S
    assert first(Verdict.NEXT, watch(1), False) == 0.0  # there is no other
    assert first(Verdict.GIVE_UP, watch(), False) == 5.0
    assert first(Verdict.GIVE_UP, watch(1), False) == 5.0


def test_routers_that_all_say_nothing_are_given_up():
    assert 6.0 <= first(Verdict.GIVE_UP, watch(3), True) <= 7.0


def test_a_word_or_rest_begins_anew():
    made = watch()
    for k in range(1, 100):
        heard, waiting = k % 2 == 0, k < 50
        said = made.tick(k * 0.9, connected=True, heard=heard, waiting=waiting)
        assert said in (Verdict.NOTHING, Verdict.PING)


@given(st.integers(0, 200), st.integers(1, 20), st.floats(0, 1))
def test_tries_grow_to_a_bound_and_differ_by_chance(num_tries, num_routers, chance):
    time_s = try_time(num_tries, num_routers, chance)
    assert FIRST_TRY_S * 2 / 3 - 1e-9 <= time_s <= LONGEST_TRY_S
    assert time_s >= try_time(num_tries, num_routers, 1.0)
    assert try_time(num_tries + num_routers, num_routers, chance) >= time_s


def test_first_losses_are_free_and_others_paced():
    budget = RetryBudget(0.0)
    assert [is_paced(losses) for losses in (0, 1, 2, 9)] == [False, False, True, True]
    assert sum(budget.take(0.0) for _ in range(1000)) == int(RETRY_BURST)
    assert sum(budget.take(1.0) for _ in range(1000)) == int(RETRIES_PER_S)
    for _ in range(50):
        budget.opened()
    assert sum(budget.take(1.0) for _ in range(1000)) in (9, 10)  # a fifth, in floats
    assert sum(budget.take(1e6) for _ in range(1000)) == int(RETRY_BURST)
