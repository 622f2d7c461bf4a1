"""The device platform: one interface over CPU, CUDA and NPU.

It knows nothing of models or plans. A platform is made once by a worker (see `selection`), before
anything is allocated; what a device cannot do is refused with the name of what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from xllm.errors import ConfigError
from xllm.worker.platform.back_end_ops import BackEndOps
from xllm.worker.platform.copies import HostCopier
from xllm.worker.platform.device_driver import DeviceDriver
from xllm.worker.platform.graphs import GraphDevice

DeviceMark = Callable[[], bool]
"""Whether the device has come past this place in its work; any thread may ask."""

KernelKind = Literal["cpu", "triton", "torch"]
"""Whose kernels: ours in C++, ours in Triton, or those that torch and its back-end bring."""

CollectiveKind = Literal["gloo", "nccl", "hccl"]
"""What ranks on this kind of device are connected by, as torch.distributed names it."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory: free for this process now, and in all."""

    free_bytes: int
    total_bytes: int


class Platform(Protocol):
    """What the engine needs to know of a device kind."""

    @property
    def name(self) -> str:
        """cpu, cuda or npu."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    @property
    def kernels(self) -> KernelKind:
        """Whose kernels compute attention and the small operations around products."""

    @property
    def collectives(self) -> CollectiveKind:
        """What connects ranks on such devices."""

    def prepare(self, num_threads: int, model_bytes: int) -> None:
        """Set the process up for computing with weights of that size. `num_threads`: threads of
        a CPU; 0: chosen here. Called by the thread that will compute, before it does."""

    def memory(self) -> DeviceMemory:
        """Memory now."""

    def kv_budget(self) -> int:
        """Bytes that KV may take where the settings leave it open; called after the weights
        are loaded."""

    def virtual_driver(self) -> DeviceDriver | None:
        """Calls on the device's virtual memory; None on a CPU, which has its own. EngineError or
        DependencyError where the device has none, or what it takes is not installed."""

    def trim(self) -> None:
        """Give memory back to the device that nothing of this process uses."""

    def synchronize(self) -> None:
        """Wait until all that was started on the device is done."""

    def mark(self) -> DeviceMark | None:
        """A mark behind all that was started so far; None where that is done already."""

    def upload(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Begin to copy a tensor of the host to `out`, or to a new tensor of the device, on the
        current stream. The host's tensor may change at once. Not while a graph is captured."""

    def copier(self) -> HostCopier:
        """A new copier of results to the host."""

    def back_end_ops(self) -> BackEndOps | None:
        """Operators that torch's back-end has in one piece, for layers that are not computed by
        kernels of ours; None: it has none that are better than torch's own."""

    def graphs(self) -> GraphDevice | None:
        """What records graphs, with a memory pool of its own; None where the device has none."""

    def describe(self) -> str:
        """The device in words, for people."""

    def fingerprint(self) -> tuple[str, ...]:
        """What decides the bits of a product beside its inputs: kind, instruction set or model,
        library versions."""


def resolve_dtype(asked: str, checkpoint: str, on_cpu: bool = False) -> torch.dtype:
    """The type of weights and KV: what was asked, or with `auto` the checkpoint's own, but for
    float16 on a CPU, which computes it many times slower than float32: there float32, which holds
    the same numbers.

    Raises ConfigError for types that the engine does not compute in.
    """
    name = checkpoint if asked == "auto" else asked
    if asked == "auto" and name == "float16" and on_cpu:
        name = "float32"
    match name:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return torch.float16
    raise ConfigError(
        f"model.dtype: the engine computes in float32, bfloat16 or float16, not {name!r}",
        param="model.dtype",
    )
