"""The benchmark of experts runs, and its figures fit together."""

import json

import pytest

from benchmarks.experts import main
from xllm.worker.kernels.compiled import load

pytestmark = pytest.mark.skipif(load().compiled is None, reason=load().reason)


def test_a_line_for_each_row_count(tmp_path, capsys):
    path = tmp_path / "experts.json"
    arguments = ["--shape", "6x64x32", "--top-k", "2", "--rows", "1,40", "--reps", "1"]
    main([*arguments, "--threads", "1", "--json", str(path)])
    lines = json.loads(path.read_text())
    assert [(line["rows"], line["chosen"]) for line in lines] == [(1, 2), (40, 6)]
    for line in lines:
        num_bytes = 2 * (line["chosen"] * 3 * 64 * 32 + 6 * 64)
        assert line["gb_s"] * line["us"] * 1e3 == pytest.approx(num_bytes)
        assert min(line["over_bound"], line["torch_bf16"]) > 0
    assert "| 40 | 6 |" in capsys.readouterr().out
