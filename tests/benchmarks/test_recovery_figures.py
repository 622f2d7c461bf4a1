"""What the recovery benchmark counts as a stream that the kill did not touch."""

from __future__ import annotations

import pytest

from benchmarks.recovery import Kill, Tokens, summary


def test_gaps_lie_inside_the_time_asked_for():
    tokens = Tokens([0.0, 1.0, 2.5, 3.0, 9.0])
    assert tokens.gaps(1.0, 4.0) == [1.5, 0.5]
    assert tokens.gaps(4.0, 8.0) == []


def test_a_stream_that_moved_counts_only_for_the_time_before():
    tokens = Tokens([0.0, 1.0, 2.0, 3.0, 4.0], moved_at=2.5)
    assert tokens.gaps(0.0, 2.5) == [1.0, 1.0]
    assert tokens.gaps(0.0, 3.0) == []


def test_figures_are_medians_of_kills_and_percentiles_of_all_gaps():
    idle = [Kill(1.0, 0.5), Kill(3.0, 2.0), Kill(2.0, 2.0)]
    busy = [Kill(4.0, 1.0, [0.1] * 99 + [0.2], [0.3] * 200), Kill(6.0, 1.0, [0.1] * 100, [])]
    figures = summary(idle, busy)
    assert figures["gone_s"] == 2.0
    assert figures["gone_over_start"] == 1.5
    assert figures["gone_under_load_s"] == 5.0
    assert figures["others_tpot_p99_before_ms"] == pytest.approx(100)
    assert figures["others_p99_ratio"] == pytest.approx(3)
    assert figures["others_tokens"] == 200
