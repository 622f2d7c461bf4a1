"""The one timer for all held tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm.router.state.wheel import FlushWheel


@given(st.lists(st.floats(0, 2), max_size=50))
def test_nothing_is_late_and_nothing_is_lost(dues):
    wheel: FlushWheel[float] = FlushWheel(0.002)
    for due in dues:
        wheel.add(due, due)
    told = []
    while (now := wheel.next_due()) is not None:
        batch = wheel.pop_due(now)
        assert batch
        assert all(now - 1e-9 <= due < now + 0.002 + 1e-9 for due in batch)
        told += batch
    assert sorted(told) == sorted(dues)
    assert wheel.pop_due(1e9) == []


def test_what_is_not_due_stays():
    wheel: FlushWheel[str] = FlushWheel(0.002)
    wheel.add("late", 1.0)
    wheel.add("soon", 0.1)
    assert wheel.pop_due(0.05) == []
    assert wheel.pop_due(0.5) == ["soon"]
    assert wheel.next_due() == 1.0
