"""Which device kind a worker runs on.

Imports no package of a device: what a kind needs is found missing when that kind is chosen.
"""

from __future__ import annotations

import torch

from xllm.errors import ConfigError, DependencyError
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.cuda import CudaPlatform
from xllm.worker.platform.npu import NpuPlatform, npu_available
from xllm.worker.platform.platform import Platform


def select_platform(device: str, rank: int = 0) -> Platform:
    """The platform that a setting asks for; errors name the setting. See make_platform."""
    try:
        return make_platform(device, rank)
    except DependencyError as error:
        raise DependencyError(
            f"worker.device is {device}, but {error.message}", param="worker.device"
        ) from error


def make_platform(device: str, rank: int = 0) -> Platform:
    """The platform of a device kind; `auto` takes the first accelerator found, else the CPU.

    Raises DependencyError where the kind's package or device is absent, ConfigError for an
    unknown kind. `rank` chooses among several accelerators.
    """
    match device:
        case "cpu":
            return CpuPlatform()
        case "cuda":
            return CudaPlatform(rank)
        case "npu":
            return NpuPlatform(rank)
        case "auto":
            if torch.cuda.is_available():
                return CudaPlatform(rank)
            return NpuPlatform(rank) if npu_available() else CpuPlatform()
    raise ConfigError(
        f"worker.device must be auto, cpu, cuda or npu, not {device!r}", param="worker.device"
    )
