"""What the programs about secrets count: whether times can be told apart, how late a refusal is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.refusals import expect, figures
from benchmarks.tenant_timing import Arm, summary
from benchmarks.two_samples import compare

VALUES = st.lists(st.integers(0, 8).map(float), min_size=2, max_size=12)


def drawn(mean, count=120, seed=3):
    lot = random.Random(f"{mean}/{seed}")
    return [lot.gauss(mean, 1.0) for _ in range(count)]


@settings(max_examples=20)
@given(VALUES, VALUES)
def test_the_chance_counts_pairs(a, b):
    pairs = [(x < y) + (x == y) / 2 for x in a for y in b]
    found, turned = compare(a, b), compare(b, a)
    assert found.chance == pytest.approx(sum(pairs) / len(pairs))
    assert turned.chance == pytest.approx(1 - found.chance)
    assert 0 <= found.low <= found.high <= 1
    assert 0 < found.p <= 1


def test_equal_samples_are_not_told_apart_and_others_are():
    same = compare(drawn(5, seed=1), drawn(5, seed=2))
    assert not same.is_apart()
    assert same.low < 0.5 < same.high
    faster, slower = compare(drawn(4), drawn(5)), compare(drawn(5), drawn(4))
    assert faster.is_apart()
    assert faster.low > 0.6 > 0.5 > slower.high
    assert slower.is_apart()
    assert slower.chance == pytest.approx(1 - faster.chance)


def test_ties_tell_nothing():
    assert compare([1.0] * 9, [1.0] * 9).p == 1.0


@pytest.mark.parametrize(("a", "b"), [([], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [])])
def test_small_samples_are_refused(a, b):
    with pytest.raises(ValueError, match="at least two"):
        compare(a, b)


def arms(asked, unasked, own, cached=(0, 0, 64)):
    samples = zip(("asked", "unasked", "own"), (asked, unasked, own), cached, strict=True)
    return {name: Arm(times, [tokens] * len(times)) for name, times, tokens in samples}


def test_the_promise_holds_where_nothing_is_seen_by_somebody_who_could_see():
    slow, again, fast = drawn(50, seed=1), drawn(50, seed=2), drawn(5)
    assert summary(arms(slow, again, fast))["holds"]
    assert not summary(arms(drawn(49), again, fast))["holds"]  # the times tell
    assert not summary(arms(slow, again, fast, (16, 0, 64)))["holds"]  # the counts tell
    assert not summary(arms(slow, again, drawn(50, seed=3)))["holds"]  # who sees nothing at all


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_figures_are_of_the_times(times):
    found = figures(times)
    assert found["p50"] <= found["p99"] <= found["max"]
    assert found["max"] == round(1e3 * max(times), 2)


def test_a_try_that_was_not_refused_ends_the_run():
    expect(True, "")
    with pytest.raises(SystemExit, match="HTTP 200"):
        expect(False, "HTTP 200")
