"""The benchmark of ranks runs on a tiny model, and all arms report all phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tensor_parallel import measure, parse, print_report
from tests.fixtures.models import make_model


@pytest.mark.process
def test_all_arms_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["--repetitions", "1", "--kv-mib", "64", "--micro-batch-rows", "8"])
    options.model = str(make_model("qwen3", tmp_path / "model"))
    report = measure(options)
    assert list(report) == ["1 worker x 2 threads", "2 ranks x 1 thread", "2 ranks, overlap"]
    alone, plain, overlap = report.values()
    assert set(plain) == set(overlap) == {*alone, "exchange", "logits", "best"}
    assert all(value > 0 for figures in report.values() for value in figures.values())
    print_report(report)
    assert "decode 64" in capsys.readouterr().out
