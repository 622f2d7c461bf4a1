"""The table of what determinism costs: what is run, and how pairs become ratios."""

import argparse

from benchmarks.alternate import parse, specs
from benchmarks.comparison import Comparison
from benchmarks.deterministic import DEFAULT, DETERMINISTIC, alternation_arguments, summary


def test_two_engines_that_differ_in_one_setting():
    options = argparse.Namespace(
        workloads="W1,W4", reps=3, threads=2, tolerance=0.1, set=["worker.kv_cache_bytes=1000"]
    )
    found = parse(alternation_arguments(options, "/m", "/tmp/out/rows.jsonl"))
    assert (found.workloads, found.reps, found.tolerance) == ("W1,W4", 3, 0.1)
    first, second = specs(found)
    assert (first["name"], second["name"]) == (DEFAULT, DETERMINISTIC)
    rest = [part for part in second["cmd"] if part != "worker.deterministic=true"]
    assert rest.count("--set") == 2
    rest.remove("--set")
    assert [part.replace(DETERMINISTIC, DEFAULT) for part in rest] == first["cmd"]


def row(peer, rep, tok_s, gbs=80.0, workload="W1"):
    figures = {"tok_s": tok_s, "ttft_mean_s": 10.0 / tok_s, "tpot_mean_s": 1.0 / tok_s}
    names = {"peer": peer, "workload": workload, "rep": rep}
    return names | figures | {"gbs_before": gbs, "gbs_after": gbs}


def test_ratios_are_of_pairs_in_the_state_with_most_of_them():
    rows = [row(DEFAULT, rep, 100.0) for rep in range(3)]
    rows += [row(DETERMINISTIC, rep, speed) for rep, speed in enumerate((90.0, 80.0, 95.0))]
    rows += [row(DEFAULT, 3, 50.0, gbs=40.0), row(DETERMINISTIC, 3, 10.0, gbs=40.0)]
    rows += [row(DEFAULT, 0, 70.0, workload="W2")]
    found = summary(Comparison(rows, 0.05, DEFAULT))
    assert set(found) == {"W1"}
    assert found["W1"]["pairs"] == 3
    assert abs(found["W1"]["tok_s"] - 0.9) < 1e-9
    assert abs(found["W1"]["tpot_mean_s"] - 0.9) < 1e-9
