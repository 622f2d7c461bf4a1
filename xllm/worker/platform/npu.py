"""The Ascend NPU platform. torch_npu is imported here, when it is asked for, and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from xllm.errors import DependencyError
from xllm.worker.platform.ascend_driver import AscendDriver
from xllm.worker.platform.npu_ops import NpuOps
from xllm.worker.platform.pinned import upload_pinned
from xllm.worker.platform.platform import CollectiveKind, DeviceMark, DeviceMemory, KernelKind
from xllm.worker.platform.stream_copies import StreamCopier, event_passed
from xllm.worker.platform.stream_graphs import StreamGraphs

_KV_SHARE = 0.85


def npu_available() -> bool:
    """Whether torch_npu is installed and sees a device."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    return bool(_import_npu().is_available())


def _import_npu() -> Any:
    """The module torch.npu, which exists once torch_npu is imported."""
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise DependencyError(
            f"the package torch_npu is not installed or does not load ({error}); install it with: "
            'pip install ".[npu]" in the directory of xLLM'
        ) from error
    return torch.npu  # type: ignore[attr-defined]  # torch_npu adds it


class NpuPlatform:
    """One Ascend NPU, through torch_npu."""

    name = "npu"
    kernels: KernelKind = "torch"
    collectives: CollectiveKind = "hccl"

    def __init__(self, rank: int = 0) -> None:
        self._npu = _import_npu()
        if not self._npu.is_available():
            raise DependencyError("torch_npu sees no device: the CANN driver is needed")
        self.device = torch.device("npu", rank % int(self._npu.device_count()))

    def prepare(self, num_threads: int, model_bytes: int) -> None:
        """Make the device current."""
        del num_threads, model_bytes
        self._npu.set_device(self.device)

    def memory(self) -> DeviceMemory:
        """Free and total memory of the NPU."""
        free, total = self._npu.mem_get_info(self.device)
        return DeviceMemory(int(free), int(total))

    def kv_budget(self) -> int:
        """85% of what is free once the cached blocks of torch are given back."""
        self.trim()
        return int(self.memory().free_bytes * _KV_SHARE)

    def virtual_driver(self) -> AscendDriver:
        """Through CANN's module acl."""
        return AscendDriver(self.device)

    def trim(self) -> None:
        """Give the cached blocks of torch back."""
        self._npu.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        self._npu.synchronize(self.device)

    def mark(self) -> DeviceMark:
        """An event on the current stream."""
        event = self._npu.Event()
        event.record()
        return lambda: event_passed(event)

    def upload(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """By way of pinned memory."""
        return upload_pinned(tensor, self.device, out)

    def copier(self) -> StreamCopier:
        """Copies on a stream of their own."""
        return StreamCopier(self._npu, self.device)

    def back_end_ops(self) -> NpuOps:
        """Those of torch_npu."""
        return NpuOps(importlib.import_module("torch_npu"), self.device)

    def graphs(self) -> StreamGraphs | None:
        """Where torch_npu has them."""
        if not hasattr(self._npu, "NPUGraph"):
            return None
        return StreamGraphs(self._npu, self.device, self._npu.NPUGraph)

    def describe(self) -> str:
        """The NPU's name."""
        return f"npu ({self._npu.get_device_name(self.device)})"

    def fingerprint(self) -> tuple[str, ...]:
        """NPU model and torch's version."""
        return ("npu", str(self._npu.get_device_name(self.device)), f"torch-{torch.__version__}")
