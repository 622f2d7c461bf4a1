"""The benchmark of the products runs, and its figures fit together."""

import json

import pytest

from benchmarks.products import main, parse_shapes
from xllm.worker.kernels.compiled import load

pytestmark = pytest.mark.skipif(load().compiled is None, reason=load().reason)


@pytest.mark.parametrize("best", [False, True])
def test_a_line_for_each_shape_and_row_count(tmp_path, capsys, best):
    path = tmp_path / "products.json"
    arguments = ["--shapes", "a=48x64,b=32x20", "--rows", "1,3", "--reps", "2", "--cold-mib", "0"]
    arguments += ["--best"] if best else []
    main([*arguments, "--threads", "1", "--json", str(path)])
    lines = json.loads(path.read_text())
    assert [(line["shape"], line["rows"]) for line in lines] == [
        ("a", 1),
        ("a", 3),
        ("b", 1),
        ("b", 3),
    ]
    for line in lines:
        size = line["outputs"] * line["inputs"]
        assert line["gb_s"] * line["us"] * 1e3 == pytest.approx(size * 2)
        assert line["gflop_s"] * line["us"] * 1e3 == pytest.approx(2 * size * line["rows"])
        assert min(line["over_bound"], line["torch_bf16"], line["torch_fp32"]) > 0
    assert "| b | 3 |" in capsys.readouterr().out


def test_shapes_are_read():
    (shape,) = parse_shapes("head=151936x1024")
    assert (shape.name, shape.outputs, shape.inputs) == ("head", 151936, 1024)
