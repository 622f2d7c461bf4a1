"""The scheduling benchmark runs what it says: so many sequences, some of them new in each step."""

import pytest

from benchmarks.scheduling import LEARN, PARTS, measure
from xllm.config.scheduling import STRATEGIES


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_load_is_steady_and_its_parts_add_up(max_in_flight, strategy):
    report = measure(40, 0.1, 20, 40, max_in_flight, strategy)
    # Where steps are of one kind, more steps pass between a request's tokens.
    assert 30 <= report["running"] <= 80
    medians = [report[part]["median_us"] for part in PARTS]
    assert all(median > 0 for median in medians)
    assert report["total"]["p99_us"] >= max(medians)
    assert 0 < report[LEARN]["median_us"] < report["update"]["median_us"]
