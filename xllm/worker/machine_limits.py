"""What this machine can do at most, measured now: bytes read and products of matrices a second."""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.nn.functional as F

from xllm.worker.platform.platform import resolve_dtype
from xllm.worker.read_probe import ReadProbe

_ROWS, _INPUTS, _OUTPUTS = 512, 1024, 3072
_PASSES = 7
_WEIGHTS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class MachineLimits:
    """Bytes read a second, floating-point operations a second in the model's type, and the
    threads that both were measured with."""

    read_bytes_s: float
    flops_s: float
    num_threads: int


def measure_limits(dtype: str) -> MachineLimits:
    """With as many threads as torch has in this process: that is what the engine set."""
    num_threads = torch.get_num_threads()
    probe = ReadProbe(num_threads)
    try:
        read_bytes_s = probe.measure()
    finally:
        probe.close()
    return MachineLimits(read_bytes_s, _matrix_rate(resolve_dtype(dtype, dtype)), num_threads)


def _matrix_rate(dtype: torch.dtype) -> float:
    """The best of some passes over products of many rows: a limit, not a habit."""
    rows = torch.randn(_ROWS, _INPUTS).to(dtype)
    weights = [torch.randn(_OUTPUTS, _INPUTS).to(dtype) for _ in range(_WEIGHTS)]
    best = 0.0
    with torch.inference_mode():
        for _ in range(_PASSES):
            began = time.perf_counter()
            for weight in weights:
                F.linear(rows, weight)
            took_s = time.perf_counter() - began
            best = max(best, 2 * _ROWS * _INPUTS * _OUTPUTS * _WEIGHTS / took_s)
    return best
