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
from xllm.worker.platform import cpu
from xllm.worker.platform.control_group import GroupMemory, group_cpus, group_memory
from xllm.worker.platform.platform import resolve_dtype
from xllm.worker.platform.selection import select_platform

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


def write_group(directory: Path, version: int, limit: str, used: int, stat: str) -> None:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    limit_name, used_name = names.get(version, ("memory.max", "memory.current"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / limit_name).write_text(f"{limit}\n")
    (directory / used_name).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(stat)


def found_groups(root: Path, membership: str) -> list[tuple[int, int]]:
    own = root / "cgroup-of-self"
    own.write_text(membership)
    return [(g.limit_bytes, g.free_bytes) for g in group_memory(root, own)]


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert group_memory(tmp_path, tmp_path / "absent") == []
    assert found_groups(tmp_path, "0::/\n") == []
    write_group(tmp_path, 2, "max", 5000, "")
    assert found_groups(tmp_path, "0::/\n") == []


def test_the_page_cache_of_a_group_is_free(tmp_path: Path) -> None:
    """A container that has read a large checkpoint: nearly all it uses is the files' cache."""
    stat = "anon 500\ninactive_file 6000\nactive_file 1000\nshmem 300\n"
    write_group(tmp_path, 2, "8000", 7800, stat)
    assert found_groups(tmp_path, "0::/\n") == [(8000, 7200)]


def test_version_1_groups_are_read(tmp_path: Path) -> None:
    """With the sums over children; the group's path and every group above it count."""
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n"
    write_group(tmp_path / "memory/outer", 1, "5000", 4000, stat)
    write_group(tmp_path / "memory/outer/inner", 1, "9000", 1500, stat)
    write_group(tmp_path / "memory", 1, str((1 << 63) - 4096), 9999, "")
    membership = "5:cpu,cpuacct:/outer\n4:memory:/outer/inner\n0::/\n"
    found = found_groups(tmp_path, membership)
    assert found[:2] == [(9000, 8000), (5000, 1500)]
    assert found[2][0] == (1 << 63) - 4096


def test_a_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    write_group(tmp_path, 2, "8000", 3000, "")
    assert found_groups(tmp_path, "0::/../system.slice/x.scope\n") == [(8000, 5000)]


def test_a_group_below_the_machine_binds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [GroupMemory(1 << 60, 1 << 60), GroupMemory(9000, 4000), GroupMemory(9500, 3000)]
    monkeypatch.setattr(cpu, "group_memory", lambda root, membership: groups)
    memory = cpu.CpuPlatform().memory()
    assert (memory.free_bytes, memory.total_bytes) == (3000, 9000)


def test_the_time_on_cpus_that_groups_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "cgroup-of-self"
    assert group_cpus(tmp_path, own) == float("inf")
    own.write_text("0::/outer/inner\n")
    for group, text in (("", "max 100000"), ("outer", "150000 100000"), ("outer/inner", "9 1")):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(f"{text}\n")
    assert group_cpus(tmp_path, own) == 1.5
    own.write_text("5:cpu,cpuacct:/\n")
    assert group_cpus(tmp_path, own) == float("inf")
    (tmp_path / "cpu,cpuacct").mkdir()
    (tmp_path / "cpu,cpuacct/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    assert group_cpus(tmp_path, own) == float("inf")
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("250000\n")
    assert group_cpus(tmp_path, own) == 2.5
    for given, cores in ((float("inf"), 6), (2.5, 2), (0.5, 1)):
        monkeypatch.setattr(cpu, "group_cpus", lambda root, membership, given=given: given)
        monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: set(range(6)))
        assert cpu.num_cores() == cores


@without_gpu
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(DependencyError, match="torch sees no GPU"):
        select_platform("cuda")


@without_npu
def test_npu_without_its_package_is_refused() -> None:
    with pytest.raises(DependencyError, match=r'torch_npu .* pip install "\.\[npu\]"'):
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
    with pytest.raises(ConfigError, match="power of two of at least 16 on a CPU, not 24"):
        PlanDriver(directory, block_size=24)
    with pytest.raises(ConfigError, match="at least 16 on a CPU, not 8"):
        PlanDriver(directory, block_size=8)


@pytest.mark.parametrize("block_size", [32, 64])
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
    # 1536 bytes a token: blocks of 24 KiB, whole pages of the machine.
    assert driver.ready.num_blocks == (1 << 30) // (1536 * 16)
    assert resident_bytes() - before < 100 << 20
    driver.executor.close()


def test_more_kv_than_memory_is_refused(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    with pytest.raises(ConfigError, match=r"worker\.kv_cache_bytes: 1125899906842624 bytes"):
        PlanDriver(directory, kv_cache_bytes=1 << 50)
