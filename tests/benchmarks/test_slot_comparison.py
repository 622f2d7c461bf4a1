"""The comparison of slots with block tables runs, and its figures hang together."""

import argparse
from pathlib import Path

import pytest

from benchmarks.xtensor import measure, print_workload
from tests.fixtures.models import make_model


def test_both_arms_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        model=str(make_model("qwen3", tmp_path / "model")),
        dtype="float32",
        threads=1,
        max_model_len=512,
        kv_mib=16,
        repetitions=1,
        workloads="warm",
    )
    report = measure(options, cases=())
    rows = report["workloads"]["warm"]
    slots, paged = rows["xtensor"], rows["paged"]
    assert slots["steps"] == paged["steps"] >= 8
    assert slots["peak_running"] == paged["peak_running"] == 4
    # 4 requests of 168 tokens at their end, and of 512 if reserved.
    assert paged["peak_blocks"] == 4 * 11
    assert slots["peak_blocks"] >= paged["peak_blocks"]
    assert slots["contiguous_mib"] / slots["kv_mib"] == 4 * 32 / slots["peak_blocks"]
    assert slots["pages_given"] == 4 * 11
    assert 0 <= slots["share_waited"] < 1
    assert slots["mappings"] > 0
    assert "share_waited" not in paged
    assert report["attention"] == []
    print_workload("warm", rows)
    assert "steps that waited for a map" in capsys.readouterr().out
