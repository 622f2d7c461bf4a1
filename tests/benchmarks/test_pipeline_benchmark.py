"""The pipeline benchmark's shapes: what models are made, and one run with the toy engine."""

import json

import pytest

from benchmarks.pipeline import measure_shapes, parse
from benchmarks.random_model import SHAPES, tensor_shapes, write_random_model
from xllm.worker.loader.config import read_config
from xllm.worker.models.registry import find_family

TINY = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def num_weights(sizes) -> int:
    return sum(rows * (rest[0] if rest else 1) for rows, *rest in tensor_shapes(sizes).values())


def test_shapes_have_the_sizes_of_their_names():
    assert 45e6 < num_weights(SHAPES["50m"]) < 55e6
    assert 590e6 < num_weights(SHAPES["0.6b"]) < 600e6
    assert 1.70e9 < num_weights(SHAPES["1.7b"]) < 1.75e9
    assert 4.00e9 < num_weights(SHAPES["4b"]) < 4.05e9
    assert 8.15e9 < num_weights(SHAPES["8b"]) < 8.25e9


def test_a_random_model_can_be_read(tmp_path):
    directory = write_random_model(TINY, tmp_path / "m")
    raw = read_config(directory)
    config = find_family(raw.architecture()).read(raw)
    assert (config.num_layers, config.hidden_size, config.qk_norm) == (2, 16, True)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert write_random_model(TINY, directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_a_shape_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--shapes", "demo,7b"])
    assert "7b" in capsys.readouterr().err


@pytest.mark.process
def test_both_sides_are_measured():
    reports = measure_shapes(parse(["--toy-ms", "1", "--repetitions", "1"]))
    [report] = json.loads(json.dumps(reports)).values()
    assert report["ratio"] > 0
    for side in ("on", "off"):
        assert report[side]["tok_s"] > 0
        assert 0 <= report[side]["idle"] < 1
        assert report[side]["newcomer_ms"] > 0
