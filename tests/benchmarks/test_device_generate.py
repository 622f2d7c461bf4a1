"""The comparison with transformers' generate: its batches, and one turn of both on the CPU."""

import argparse
import asyncio

import pytest
import torch

from benchmarks.device_generate import main, measure, pad_left, requests_of
from benchmarks.random_model import write_random_model
from tests.benchmarks.test_pipeline_benchmark import TINY


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_left([([5, 6, 7], 2), ([8], 3)])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("workload", ["mixed", "equal"])
def test_lengths_stay_and_ids_change(workload):
    one, other = requests_of(workload, 1), requests_of(workload, 2)
    shapes = [[(len(prompt), count) for prompt, count in found] for found in (one, other)]
    assert shapes[0] == shapes[1]
    assert len(one) == 32
    assert one != other


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["device_generate"])
    with pytest.raises(SystemExit, match="NVIDIA GPU"):
        main()


def test_one_turn_of_both(tmp_path, monkeypatch):
    directory = write_random_model({**TINY, "max_position_embeddings": 64}, tmp_path / "m")
    small = [([3 + n, 4, 5], 2 + n) for n in range(3)]
    monkeypatch.setattr("benchmarks.device_generate.requests_of", lambda name, turn: small)
    options = argparse.Namespace(shape="m", device="cpu", turns=1, kv_bytes=1 << 20)
    report = asyncio.run(measure(options, directory))
    assert set(report) == {"mixed", "equal"}
    assert all(found["ratio"] > 0 for found in report.values())
