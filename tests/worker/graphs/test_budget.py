"""Captures take no more than their share of the time, whatever comes when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.worker.graphs.budget import CaptureBudget

costs = st.floats(0.0, 2.0)
waits = st.floats(0.0, 30.0)


def test_a_capture_closes_the_budget_for_a_multiple_of_its_time():
    budget = CaptureBudget(0.1)
    assert budget.allows(5.0)
    budget.spend(6.0, 1.0)
    assert not budget.allows(14.9)
    assert budget.allows(15.1)


def test_captures_in_a_row_add_up():
    budget = CaptureBudget(0.5)
    budget.spend(1.0, 1.0)
    budget.spend(2.0, 1.0)
    assert not budget.allows(3.9)
    assert budget.allows(4.1)


def test_no_bound():
    budget = CaptureBudget(1.0)
    budget.spend(1.0, 1.0)
    assert budget.allows(1.0)


@given(st.lists(st.tuples(waits, costs), max_size=60), st.sampled_from([0.02, 0.05, 0.5, 1.0]))
def test_captures_never_take_more_than_their_share_and_one(tries, share):
    """At any time all but the last one have been paid for."""
    budget, now, spent = CaptureBudget(share), 0.0, []
    for wait, cost in tries:
        now += wait
        if budget.allows(now):
            assert sum(spent) <= share * now * (1 + 1e-9) + 1e-9
            now += cost
            spent.append(cost)
            budget.spend(now, cost)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_part(share):
    with pytest.raises(AssertionError):
        CaptureBudget(share)
