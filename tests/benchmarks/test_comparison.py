"""Which repetitions count, in which state, and what the ratios are of."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.comparison import (
    STATE_GAP,
    Comparison,
    bare_table,
    counts,
    state_borders,
    state_of,
)
from tests.fixtures.models import make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]


def row(peer, rep, tok_s, gbs=50.0, workload="W2", after=None):
    return {
        "peer": peer,
        "rep": rep,
        "workload": workload,
        "tok_s": tok_s,
        "ttft_mean_s": 10 / tok_s,
        "tpot_mean_s": 1 / tok_s,
        "gbs_before": gbs,
        "gbs_after": gbs if after is None else after,
    }


def test_a_repetition_counts_where_the_probes_agree():
    assert counts(row("a", 0, 1, 100, after=95.1), 0.05)
    assert not counts(row("a", 0, 1, 100, after=94.9), 0.05)
    assert not counts(row("a", 0, 1, 94.9, after=100), 0.05)
    assert not counts({**row("a", 0, 1), "error": "it fell over"}, 0.05)


def test_two_states_are_told_apart_and_small_drifts_are_not():
    assert state_borders([44, 46, 48, 50]) == []
    [border] = state_borders([81, 44, 47, 50, 79, 83])
    assert 50 < border < 79
    assert state_of(row("a", 0, 1, 49), [border]) == 0
    assert state_of(row("a", 0, 1, 80), [border]) == 1


@given(st.lists(st.floats(min_value=1, max_value=1000), min_size=1, max_size=30))
def test_neighbours_within_the_gap_share_a_state(speeds):
    borders = state_borders(speeds)
    ordered = sorted(speeds)
    states = [state_of(row("a", 0, 1, speed), borders) for speed in ordered]
    for (low, high), (before, after) in zip(
        itertools.pairwise(ordered), itertools.pairwise(states), strict=True
    ):
        assert after - before in (0, 1)
        assert (high > STATE_GAP * low * (1 + 1e-9)) <= (after > before)


def test_ratios_are_of_pairs_in_one_state():
    rows = [row("a", 0, 10), row("b", 0, 12), row("a", 1, 10), row("b", 1, 20)]
    rows += [row("a", 2, 20, 80), row("b", 2, 19, 80)]  # the fast state
    rows += [row("b", 3, 99)]  # nothing of the baseline beside it
    found = Comparison(rows, 0.05, "a")
    slow = found.ratio("W2", 0, "b", "tok_s", True)
    assert slow == (1.2, 1.6, 2.0, 2)
    assert found.ratio("W2", 0, "b", "ttft_mean_s", False) == pytest.approx(slow)
    assert found.ratio("W2", 1, "b", "tok_s", True) == (0.95, 0.95, 0.95, 1)
    assert found.ratio("W2", 1, "c", "tok_s", True) is None
    assert not found.enough("W2", ["a", "b"], 3)
    assert found.enough("W2", ["a", "b"], 2)
    table = found.table()
    assert "| W2 | 50.0-50.0 | b | 3 | 12.0/20.0/99.0 | 1.20/1.60/2.00 |" in table
    assert "7 repetitions used, 0 left out" in table


def test_what_failed_is_shown():
    rows = [row("a", 0, 10), {**row("a", 1, 10), "error": "out of tea"}, row("a", 2, 1, after=9)]
    table = Comparison(rows, 0.05, "a").table()
    assert "1 repetitions used, 1 left out (the memory's speed changed), 1 failed" in table
    assert "W2 1 a: out of tea" in table


def test_bare_products_beside_the_bound():
    rows = [{**row("bare", 0, 1, 40), "products_s": {"1": 0.03, "16": 0.06}}]
    assert "| 1 | 30.00/30.00/30.00 | 25.00/25.00/25.00 | 1.20/1.20/1.20 |" in bare_table(rows, 1e9)


FAKE = """
    import json, sys
    print("hello")
    print("READY " + json.dumps({"peer": "fake"}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("quit"):
            break
        figures = {"tok_s": SPEED, "ttft_mean_s": 0.1, "tpot_mean_s": 0.01}
        print("RESULT " + json.dumps(command | figures), flush=True)
"""


@pytest.mark.process
def test_alternation_of_drivers(tmp_path):
    peers = []
    for name, speed in (("slow", 10.0), ("fast", 15.0)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(FAKE).replace("SPEED", str(speed)))
        peers.append({"name": name, "cmd": [sys.executable, str(tmp_path / f"{name}.py")]})
    peers[1]["only"] = ["W2"]
    peers.append({"name": "gone", "cmd": [sys.executable, "-c", "raise SystemExit(3)"]})
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    model = make_model("qwen3", tmp_path / "m", tokenizer="none")
    command = [sys.executable, "-m", "benchmarks.alternate", "--peers", tmp_path / "peers.json"]
    command += ["--workloads", "W1,W2", "--reps", "2", "--tolerance", "1", "--bare"]
    command += ["--model", model, "--out", tmp_path / "o.jsonl", "--logs", tmp_path / "logs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "SKIPPED gone" in done.stdout
    assert "1.50/1.50/1.50" in done.stdout
    assert "products / bound" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    order = [found["peer"] for found in rows if found["workload"] == "W2"]
    assert order[:6] == ["bare", "slow", "fast"] * 2
    assert {found["peer"] for found in rows if found["workload"] == "W1"} == {"bare", "slow"}
    assert (tmp_path / "logs" / "slow.log").read_text() == "hello\n"
    command = [sys.executable, "-m", "benchmarks.alternate", "--table", tmp_path / "o.jsonl"]
    command += ["--baseline", "fast", "--tolerance", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "0.67/0.67/0.67" in shown.stdout
