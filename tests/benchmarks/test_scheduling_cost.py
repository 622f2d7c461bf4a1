"""The scheduling benchmark runs what it says: so many sequences, some of them new in each step."""

import pytest

from benchmarks.scheduling import PARTS, measure


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_load_is_steady_and_its_parts_add_up(max_in_flight):
    report = measure(running=40, churn=0.1, prompt=20, steps=40, max_in_flight=max_in_flight)
    assert 30 <= report["running"] <= 48
    medians = [report[part]["median_us"] for part in PARTS]
    assert all(median > 0 for median in medians)
    assert report["total"]["p99_us"] >= max(medians)
