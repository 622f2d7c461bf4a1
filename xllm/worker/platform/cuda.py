"""The CUDA platform."""

from __future__ import annotations

import importlib.util

import torch

from xllm.errors import DependencyError
from xllm.worker.platform.cuda_driver import CudaDriver
from xllm.worker.platform.pinned import upload_pinned
from xllm.worker.platform.platform import CollectiveKind, DeviceMark, DeviceMemory, KernelKind
from xllm.worker.platform.stream_copies import StreamCopier, event_passed
from xllm.worker.platform.stream_graphs import StreamGraphs

_KV_SHARE = 0.85
_LEAST_FOR_TRITON = (8, 0)
"""Ampere: the first with bfloat16 and asynchronous copies, which our kernels are written for."""


class CudaPlatform:
    """One NVIDIA GPU. KV takes 85% of what the weights leave unless told otherwise: the rest
    is for activations."""

    name = "cuda"
    collectives: CollectiveKind = "nccl"

    def __init__(self, rank: int = 0) -> None:
        if not torch.cuda.is_available():
            raise DependencyError(
                "torch sees no GPU: a CUDA build of torch and a driver are needed"
            )
        self.device = torch.device("cuda", rank % torch.cuda.device_count())

    @property
    def kernels(self) -> KernelKind:
        """Our own where Triton is there and the GPU is not older than they are made for."""
        capability = torch.cuda.get_device_capability(self.device)
        fits = capability >= _LEAST_FOR_TRITON and importlib.util.find_spec("triton") is not None
        return "triton" if fits else "torch"

    def prepare(self, num_threads: int, model_bytes: int) -> None:
        """Make the device current; fp32 products stay fp32 (no TF32)."""
        del num_threads, model_bytes
        torch.cuda.set_device(self.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        # Sums of 16-bit products are kept in fp32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def memory(self) -> DeviceMemory:
        """Free and total memory of the GPU."""
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(free, total)

    def kv_budget(self) -> int:
        """85% of what is free once the cached blocks of torch are given back."""
        self.trim()
        return int(self.memory().free_bytes * _KV_SHARE)

    def virtual_driver(self) -> CudaDriver:
        """Through cuda-bindings."""
        return CudaDriver(self.device)

    def trim(self) -> None:
        """Give the cached blocks of torch back."""
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> DeviceMark:
        """An event on the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no stub for it
        event.record()
        return lambda: event_passed(event)

    def upload(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """By way of pinned memory."""
        return upload_pinned(tensor, self.device, out)

    def copier(self) -> StreamCopier:
        """Copies on a stream of their own."""
        return StreamCopier(torch.cuda, self.device)

    def back_end_ops(self) -> None:
        """None: what torch lacks our kernels have."""

    def graphs(self) -> StreamGraphs:
        """CUDA graphs."""
        return StreamGraphs(torch.cuda, self.device, torch.cuda.CUDAGraph)

    def describe(self) -> str:
        """The GPU's name."""
        return f"cuda ({torch.cuda.get_device_name(self.device)})"

    def fingerprint(self) -> tuple[str, ...]:
        """GPU model, compute capability and torch's version."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return (
            "cuda",
            torch.cuda.get_device_name(self.device),
            f"sm-{major}{minor}",
            f"torch-{torch.__version__}",
        )
