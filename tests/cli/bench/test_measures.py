"""Percentiles, latencies, goodput: checked by hand and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cli.bench.measures import (
    Distribution,
    Objectives,
    RequestRecord,
    peak_concurrency,
    percentile,
    summarize,
)


def record(index=0, sent=0.0, tokens=(1.0, 2.0, 4.0), output=None, error="", due=None):
    last = tokens[-1] if tokens else sent + 1
    return RequestRecord(
        index, sent if due is None else due, sent, list(tokens), last, 10,
        len(tokens) if output is None else output, error,
    )  # fmt: skip


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values, point):
    expected = float(np.percentile(values, point))
    assert percentile(sorted(values), point) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_distribution():
    found = Distribution.of([3.0, 1.0, 2.0])
    assert (found.mean, found.p50, found.high, found.count) == (2, 2, 3, 3)
    assert found.p90 == pytest.approx(2.8)
    assert math.isnan(Distribution.of([]).p99)


def test_latencies_of_a_request():
    one = record(sent=0.5)
    assert one.ttft_s == 0.5
    assert one.tpot_s == 1.5
    assert one.gaps_s == [1, 2]
    assert one.e2e_s == 3.5
    packed = record(sent=0.5, output=7)  # several tokens in a word
    assert packed.tpot_s == 0.5
    assert record(tokens=(1.0,)).tpot_s is None
    assert record(tokens=()).ttft_s is None


def test_goodput():
    objectives = Objectives(ttft_s=1.0, tpot_s=1.5)
    assert objectives.any
    assert not Objectives().any
    assert objectives.met(record())
    assert not objectives.met(record(tokens=(1.1, 2.0)))
    assert not objectives.met(record(tokens=(1.0, 2.6)))
    assert objectives.met(record(tokens=(1.0,)))  # no second token, no TPOT to miss
    assert not objectives.met(record(error="x: y"))
    assert not Objectives(e2e_s=3).met(record())


def test_a_summary():
    records = [
        record(0),
        record(1, sent=1.0, tokens=(3.0, 5.0), due=0.5),
        record(2, sent=1.0, error="HTTP 503: busy"),
        record(3, sent=1.0, error="HTTP 503: very busy"),
        record(4, sent=1.0, tokens=(), error="stream cut: gone"),
    ]
    found = summarize(records, Objectives(ttft_s=1.5))
    assert (found.num_requests, found.num_completed, found.num_failed) == (5, 2, 3)
    assert found.duration_s == 5
    assert found.num_output_tokens == 5
    assert found.output_tokens_s == 1
    assert found.total_tokens_s == 5
    assert found.goodput_s == 0.2
    assert found.met_share == 0.2
    assert found.ttft_s.count == 2
    assert found.itl_s.count == 3
    assert found.late_s.high == 0.5
    assert found.errors == {"HTTP 503": 2, "stream cut": 1}
    assert found.first_errors == {"HTTP 503": "HTTP 503: busy", "stream cut": "stream cut: gone"}


def test_nothing_is_no_division_by_zero():
    found = summarize([], Objectives(ttft_s=1))
    assert (found.requests_s, found.goodput_s, found.met_share) == (0, 0, None)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=20))
def test_the_peak_is_that_of_counting(spans):
    records = [RequestRecord(0, a, sent_s=a, ended_s=a + length) for a, length in spans]
    counted = [sum(r.sent_s <= at < r.ended_s for r in records) for at in range(30)]
    assert peak_concurrency(records) == max(counted)
