"""The kernels' benchmark: its costs are those of the shapes, and a dry run over the fake device."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import device_kernels
from benchmarks.device_costs import (
    SHAPES,
    Cost,
    DeviceShape,
    Limits,
    against_tables,
    attention_cost,
    gate_cost,
    line,
    norm_cost,
    table,
    write_cost,
)
from benchmarks.device_kernels import Arguments, Stage, measure, measure_limits, report
from tests.worker.platform.host_device import FakeDriver, HostDevice
from tests.worker.triton_interpreter import DEVICE

TINY = DeviceShape("tiny", 2, 32, 48, 4, 2, 16)
EIGHT = SHAPES["qwen3-8b"]


def test_a_decode_reads_every_key_once():
    cost = attention_cost(EIGHT, 64, 1, 2048)
    assert cost.num_bytes == 64 * (2048 * 4096 + 2 * 4096 * 2)
    assert cost.operations == 64 * 4 * 2048 * 4096


def test_a_prefill_multiplies_what_is_seen():
    """Half of the square and half of the diagonal; with a prefix the rest of the rectangle."""
    whole, chunk = attention_cost(EIGHT, 1, 2048, 2048), attention_cost(EIGHT, 1, 512, 2048)
    assert whole.operations == 4 * 4096 * (2048 * 2049 // 2)
    assert chunk.operations == 4 * 4096 * (512 * 1536 + 512 * 513 // 2)
    assert attention_cost(EIGHT, 1, 1, 77).operations == 4 * 4096 * 77


def test_what_is_fused_moves_its_rows_once():
    assert write_cost(EIGHT, 10).num_bytes == 10 * (2 * 48 * 128 * 2 + 2 * 64 * 4 + 12)
    assert norm_cost(EIGHT, 10).num_bytes == 41 * 4096 * 2
    assert gate_cost(EIGHT, 10).num_bytes == 30 * 12288 * 2


def test_the_roofline_is_the_nearer_limit():
    limits = Limits(bandwidth=1e12, rate=1e14)
    assert limits.seconds(Cost(10**9, 10**9)) == pytest.approx(1e-3)
    assert limits.seconds(Cost(10**6, 10**12)) == pytest.approx(1e-2)
    found = line(EIGHT, "decode", "x", Cost(10**9, 0), 2e-3, limits)
    assert found["of_roofline"] == pytest.approx(0.5)
    assert found["gb_s"] == pytest.approx(500)


@pytest.mark.parametrize(("budget", "layers"), [(1, 1), (3 * 4096 * 100, 3), (1 << 40, 36)])
def test_as_many_layers_as_the_budget_holds(budget, layers):
    assert EIGHT.layers_within(100, budget) == layers


def test_tables_are_compared_with_slots():
    limits = Limits(1e12, 1e14)
    names = {"decode": 1e-3, "decode, tables": 1.1e-3, "decode, tables of 16": 2e-3}
    lines = [line(EIGHT, k, "c", Cost(1, 1), s, limits) for k, s in names.items()]
    assert "| qwen3-8b | decode, c | 1.100 | 2.000 |" in against_tables(lines)
    assert against_tables(lines[:2]).count("\n") == 1


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the fake device is the host")
def test_a_dry_run_measures_every_kernel():
    """The kernels are interpreted over a fake device: no figure means anything but that it is one.
    Slots and tables give the same attention, or it would stop."""

    def clock(run, reps):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    driver = FakeDriver(HostDevice(total_bytes=1 << 26))
    stage = Stage(torch.device("cpu"), driver, clock, torch.float32)
    limits = measure_limits(stage, 1, copied=1 << 16, size=16)
    lines = measure(stage, limits, Arguments((TINY,), (1, 2), 40, 24, 1, 1 << 20))
    kernels = [x["kernel"] for x in lines]
    assert kernels.count("decode") == kernels.count("prefill") == 2
    assert {"decode, tables of 16", "rope and write", "add and norm", "silu and mul"} < set(kernels)
    assert all(x["us"] > 0 and x["of_roofline"] > 0 for x in lines)
    text = report(limits, lines, "a host")
    assert text.count("| tiny | decode | ") == 2
    assert table(lines) in text
    json.dumps([dataclasses.asdict(limits), *lines])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, and torch sees none"):
        device_kernels.main([])
