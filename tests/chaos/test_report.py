"""The table of a run: what did not hold, and what a slow machine can do about bounds of time."""

from __future__ import annotations

import pytest

from xllm.cli.chaos.options import ChaosOptions
from xllm.cli.chaos.report import ChaosReport, table
from xllm.cli.chaos.scenarios.table import SCENARIOS
from xllm.cli.chaos.verdict import Injection


def told(slack: float, **found: object) -> list[str]:
    report = ChaosReport(ChaosOptions(slack=slack), [SCENARIOS["F01"]])
    report.injections.append(Injection("F01", "instance-0", 0.0, 32, **found))
    return table(report.as_json())


@pytest.mark.parametrize(("slack", "proposed"), [(1.0, "3"), (2.5, "7.5"), (50.0, "100")])
def test_a_bound_of_time_that_does_not_hold_proposes_more_slack(slack, proposed):
    lines = told(slack, detect_s=2.6 * slack)
    assert f"F01: detect_ms is {2600 * slack:g}, not at most {1000 * slack:g}" in lines
    (line,) = [line for line in lines if "--slack" in line]
    assert line.endswith(f"on a slow or busy one: --slack {proposed}")


@pytest.mark.parametrize("found", [{}, {"failures": {"unavailable": 1}}, {"broken": ["odd"]}])
def test_what_is_no_bound_of_time_does_not(found):
    assert not [line for line in told(1.0, detect_s=0.1, **found) if "--slack" in line]


def test_no_more_slack_is_proposed_than_is_taken():
    assert not [line for line in told(100.0, detect_s=260.0) if "--slack" in line]
