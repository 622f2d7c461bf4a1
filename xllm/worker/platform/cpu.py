"""The CPU platform: threads, free memory (of the machine and of the control group), ISA."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from xllm.worker.platform.control_group import group_cpus, group_memory
from xllm.worker.platform.copies import InstantCopier
from xllm.worker.platform.platform import CollectiveKind, DeviceMemory, KernelKind

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_KV_SHARE = 4
_KV_CEILING_BYTES = 4 << 30
_SMALL_MODEL_BYTES = 64 << 20


class CpuPlatform:
    """Computes on the host. KV takes at most a quarter of the free memory and 4 GiB unless
    told otherwise: a host is shared."""

    name = "cpu"
    kernels: KernelKind = "cpu"
    collectives: CollectiveKind = "gloo"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def prepare(self, num_threads: int, model_bytes: int) -> None:
        """Set the threads of the engine; 0 takes every core this process may use, but one
        for a small model: its products are shorter than the wait for a second thread, which on
        a busy host costs milliseconds each."""
        if not num_threads:
            small = model_bytes < _SMALL_MODEL_BYTES
            num_threads = 1 if small else num_cores()
        torch.set_num_threads(num_threads)

    def memory(self) -> DeviceMemory:
        """Free and total memory, the tighter of machine and control group."""
        free, total = _machine_memory(Path("/proc/meminfo"))
        groups = group_memory(_GROUPS, _MEMBERSHIP)
        binding = [group for group in groups if group.limit_bytes < total]
        return DeviceMemory(
            min([free, *(group.free_bytes for group in binding)]),
            min([total, *(group.limit_bytes for group in binding)]),
        )

    def kv_budget(self) -> int:
        """A quarter of what is free, at most 4 GiB."""
        return min(self.memory().free_bytes // _KV_SHARE, _KV_CEILING_BYTES)

    def virtual_driver(self) -> None:
        """The kernel's calls are enough: see `CpuVirtualMemory`."""

    def trim(self) -> None:
        """What is let go is the machine's at once."""

    def synchronize(self) -> None:
        """Nothing runs behind our back here."""

    def mark(self) -> None:
        """What was started is done."""

    def upload(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of it."""
        return tensor.clone() if out is None else out.copy_(tensor)

    def copier(self) -> InstantCopier:
        """Copies are there at once."""
        return InstantCopier()

    def back_end_ops(self) -> None:
        """None."""

    def graphs(self) -> None:
        """A call costs little here."""

    def describe(self) -> str:
        """Instruction set and threads."""
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu ({capability}, {torch.get_num_threads()} threads)"

    def fingerprint(self) -> tuple[str, ...]:
        """Instruction set, threads and torch's version."""
        return (
            "cpu",
            torch.backends.cpu.get_cpu_capability(),
            f"threads-{torch.get_num_threads()}",
            f"torch-{torch.__version__}",
        )


def num_cores() -> int:
    """Cores that this process may use: those that it may run on, as far as its control groups give
    it time on them. More threads would be stopped together for most of each period."""
    return max(int(min(len(os.sched_getaffinity(0)), group_cpus(_GROUPS, _MEMBERSHIP))), 1)


def _machine_memory(path: Path) -> tuple[int, int]:
    """(available, total) bytes of the machine."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in ("MemAvailable", "MemTotal"):
            found[key] = int(rest.split()[0]) * 1024
    return found["MemAvailable"], found["MemTotal"]
