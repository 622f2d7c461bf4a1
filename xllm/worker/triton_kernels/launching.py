"""What every launch needs of its tensors and its device."""

from __future__ import annotations

import math

import torch
from triton.errors import TritonError

from xllm.errors import InvariantError

KERNEL_ERRORS = (TritonError,)
"""What Triton raises for a kernel that it cannot compile, or that is too large for the device."""

_LOG2_E = math.log2(math.e)
_INTERPRETED_MULTIPROCESSORS = 4


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of a CPU, where kernels are interpreted, as if it had four."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def attention_scales(scale: float, softcap: float) -> tuple[float, float]:
    """What the kernels multiply products by before the tanh, and behind it: scores in log2 units.
    `scale` and `softcap` (0: none) as in layers.decoder.Attention."""
    if not softcap:
        return scale * _LOG2_E, 0.0
    # tanh(x) = 1 - 2 / (1 + 2^(2 x log2(e)))
    return 2.0 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def check_contiguous(**tensors: torch.Tensor) -> None:
    """InvariantError for a tensor whose numbers do not lie one behind the other."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise InvariantError(f"{name} is not contiguous: {tensor.shape} by {tensor.stride()}")
