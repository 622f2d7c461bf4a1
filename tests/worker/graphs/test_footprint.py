"""What graphs take: the driver's part from the captures that shared their pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.worker.graphs.footprint import NO_GRAPHS, GraphFootprint, bytes_each

MIB = 1 << 20


@pytest.mark.parametrize(
    ("free", "each"),
    [
        ([], 0),
        ([100], 0),
        ([100, 90], 10),
        # The first has the pool; the driver takes two at a time.
        ([1000, 400, 400, 380, 380], 10),
        # Others give memory back meanwhile.
        ([100, 90, 200, 300], 0),
    ],
)
def test_the_later_captures_say_what_one_takes(free, each):
    assert bytes_each(free) == each


@given(st.integers(0, 100 * MIB), st.integers(0, 4 * MIB), st.integers(2, 40))
def test_a_driver_that_takes_the_same_for_each_is_found_out(pool, each, count):
    free = [1 << 40, (1 << 40) - pool - each]
    for _ in range(count):
        free.append(free[-1] - each)
    assert bytes_each(free) == each


def test_what_is_taken_is_not_planned_twice():
    graphs = GraphFootprint(taken_bytes=70, each_bytes=3, most=10)
    assert graphs.driver_bytes == 30
    assert graphs.missing_bytes(100) == 30
    assert graphs.missing_bytes(60) == 0
    assert NO_GRAPHS.missing_bytes(0) == NO_GRAPHS.driver_bytes == 0
