"""The accelerator benchmark's arithmetic, and its driver with an executor on the CPU."""

import argparse

import pytest

from benchmarks.device_costs import Limits
from benchmarks.device_engine import (
    Bench,
    decode_work,
    main,
    measure_shape,
    parse,
    prefill_work,
    ratios,
    settings_for,
)
from benchmarks.random_model import SHAPES, write_random_model
from tests.benchmarks.test_pipeline_benchmark import TINY


def test_the_work_of_a_decode_is_its_weights_and_its_keys():
    work = decode_work(SHAPES["8b"], 64, 2048)
    assert 15.0e9 < work.weight_bytes < 15.2e9  # all but the embedding, of which rows are read
    assert work.kv_bytes == 147456 * 64 * 2048
    assert work.product_flops == work.weight_bytes * 64
    assert work.attention_flops == 4 * 36 * 32 * 128 * 64 * 2048


def test_the_work_of_a_prompt_sees_half_of_all_pairs_and_reads_each_key_once():
    work = prefill_work(SHAPES["0.6b"], 2048)
    assert work.attention_flops == 4 * 28 * 16 * 128 * (2048 * 2049 // 2)
    assert work.kv_bytes == 114688 * 2048


def test_the_bound_is_whatever_takes_longer():
    work = decode_work(SHAPES["8b"], 1, 2048)
    slow_memory = Limits(1e12, 1e18)
    assert work.bound_s(slow_memory) == pytest.approx((work.weight_bytes + work.kv_bytes) / 1e12)
    slow_products = Limits(1e18, 1e12)
    flops = work.product_flops + work.attention_flops
    assert work.bound_s(slow_products) == pytest.approx(flops / 1e12)


def test_unknown_shapes_are_refused():
    with pytest.raises(SystemExit):
        parse(["--shapes", "9b"])
    assert parse(["--batches", "1,2"]).batches == [1, 2]


def test_without_a_gpu_it_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["device_engine"])
    with pytest.raises(SystemExit, match="NVIDIA GPU"):
        main()


def test_a_run_on_the_cpu_has_every_figure(tmp_path):

    directory = write_random_model(TINY, tmp_path / "m")
    options = argparse.Namespace(device="cpu", batches=[1, 3], context=20, steps=4)
    found = measure_shape(TINY, directory, options)
    result = ratios(TINY, found, Limits(1e9, 1e9), options.context)
    assert result["prefill_of_matrix_rate"] > 0
    for name in ("decode_of_bound", "graphs", "pipeline"):
        assert set(result[name]) == {"1", "3"}
        assert min(result[name].values()) > 0


def test_the_driver_gives_the_same_tokens_one_or_two_ahead(tmp_path):
    directory = write_random_model(TINY, tmp_path / "m")
    options = argparse.Namespace(device="cpu", batches=[2], context=20, steps=6)
    bench = Bench(TINY, settings_for(directory, options), 20)
    runs = []
    for ahead in (1, 2):
        sequences = bench._sequences(2, 6)
        bench._driver.ahead = ahead
        bench._driver.prefill(sequences, chunk=7)
        assert len(bench._driver.decode(sequences, 6)) == 6
        bench._driver.end(sequences)
        runs.append([one.tokens for one in sequences])
    bench.close()
    assert runs[0] == runs[1]
    assert [len(tokens) for tokens in runs[0]] == [8, 8]
