"""The device platforms, and how much KV memory they give."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver
from xllm.errors import ConfigError, DependencyError
from xllm.worker.memory.layout import choose_num_blocks
from xllm.worker.platform.cpu import _group_memory
from xllm.worker.platform.platform import resolve_dtype, select_platform

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
without_npu = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed"
)


def test_cpu_platform() -> None:
    platform = select_platform("cpu")
    assert platform.name == "cpu"
    assert platform.device == torch.device("cpu")
    memory = platform.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < platform.kv_budget() <= 4 << 30
    assert platform.fingerprint()[0] == "cpu"


def test_cpu_threads() -> None:
    before = torch.get_num_threads()
    platform = select_platform("cpu")
    try:
        platform.prepare(0, 1 << 30)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        platform.prepare(0, 4 << 20)
        assert torch.get_num_threads() == 1
        platform.prepare(2, 4 << 20)
        assert torch.get_num_threads() == 2
        platform.prepare(1, 1 << 30)
        assert torch.get_num_threads() == 1
        assert "threads-1" in platform.fingerprint()
    finally:
        torch.set_num_threads(before)


def test_control_group_limits_are_read(tmp_path: Path) -> None:
    assert _group_memory(tmp_path) == (0, 0)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert _group_memory(tmp_path) == (0, 0)
    (tmp_path / "memory.max").write_text("8000\n")
    assert _group_memory(tmp_path) == (8000, 5000)


@without_gpu
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(DependencyError, match="torch sees no GPU"):
        select_platform("cuda")


@without_npu
def test_npu_without_its_package_is_refused() -> None:
    with pytest.raises(DependencyError, match=r'torch_npu .* pip install "xllm\[npu\]"'):
        select_platform("npu")


@without_gpu
@without_npu
def test_auto_falls_back_to_the_cpu() -> None:
    assert select_platform("auto").name == "cpu"


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="not 'tpu'"):
        select_platform("tpu")


def test_dtypes() -> None:
    assert resolve_dtype("auto", "bfloat16") == torch.bfloat16
    assert resolve_dtype("float32", "bfloat16") == torch.float32
    with pytest.raises(ConfigError, match="float8"):
        resolve_dtype("auto", "float8_e4m3fn")


def sized(asked: int, budget: int) -> int:
    return choose_num_blocks(
        asked_bytes=asked,
        budget_bytes=budget,
        bytes_per_block=1000,
        block_size=16,
        max_num_seqs=4,
        max_model_len=100,
    )


def test_kv_sizes() -> None:
    assert sized(0, 20_500) == 20
    # Four sequences of seven blocks, and one each to spare: more is of no use.
    assert sized(0, 10**9) == 32
    assert sized(50_000, 10) == 50
    with pytest.raises(ConfigError, match="kv_cache_bytes: 1999 bytes hold 1 blocks"):
        sized(1999, 10**9)
    with pytest.raises(ConfigError, match="at least 2"):
        sized(0, 1000)


def test_block_size_must_be_a_power_of_two(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    with pytest.raises(ConfigError, match="power of two, not 24"):
        PlanDriver(directory, block_size=24)


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_block_sizes_give_the_same_tokens(tmp_path: Path, block_size: int) -> None:
    directory = make_model("mistral-window", tmp_path)
    outputs = []
    for size in (16, block_size):
        driver = PlanDriver(directory, block_size=size)
        jobs = [driver.job(list(range(5, 5 + n)), 40) for n in (1, 17, 60)]
        driver.generate(jobs, chunk=13)
        outputs.append([job.output for job in jobs])
    assert outputs[0] == outputs[1]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_untouched_kv_takes_no_memory(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    before = resident_bytes()
    driver = PlanDriver(directory, kv_cache_bytes=1 << 30)
    driver.step([driver.job([1, 2, 3])])
    assert driver.ready.num_blocks == (1 << 30) // (1536 * 16)
    assert resident_bytes() - before < 100 << 20
    driver.executor.close()


def test_more_kv_than_memory_is_refused(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    with pytest.raises(ConfigError, match=r"worker\.kv_cache_bytes: 1125899906842624 bytes"):
        PlanDriver(directory, kv_cache_bytes=1 << 50)
