"""Pinned host memory: what a device reads and writes by itself while the host goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

PinnedMaker = Callable[[int], torch.Tensor]
"""Makes pinned memory of so many bytes, uint8. torch's allocator behind it gives memory to nobody
else before the copies that were begun from it or to it are done."""

_LEAST_BYTES = 256


def pinned_bytes(num_bytes: int) -> torch.Tensor:
    """Pinned memory of the accelerator that torch sees."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def shaped(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of `memory` as a tensor of the shape and type of `like`."""
    return memory[: like.nbytes].view(like.dtype).view(like.shape)


def upload_pinned(
    tensor: torch.Tensor,
    device: torch.device,
    out: torch.Tensor | None,
    make: PinnedMaker = pinned_bytes,
) -> torch.Tensor:
    """Begin to copy a tensor of the host to `out`, or to a new tensor on `device`, by way of pinned
    memory; on the current stream. The host's tensor may change at once."""
    staged = shaped(make(tensor.nbytes), tensor)
    staged.copy_(tensor)
    if out is None:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return out.copy_(staged, non_blocking=True)


class PinnedBuffers:
    """Pinned memory that is taken and given back: making it costs a call into the driver. Who gives
    a buffer back is done with it, and so is the device."""

    def __init__(self, make: PinnedMaker = pinned_bytes) -> None:
        self._make = make
        self._free: dict[int, list[torch.Tensor]] = {}

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory of at least so many bytes, uint8, nobody else's until it is given back."""
        size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length()) if num_bytes else _LEAST_BYTES
        free = self._free.setdefault(size, [])
        return free.pop() if free else self._make(size)

    def give_back(self, memory: torch.Tensor) -> None:
        """Take it for others. Any thread."""
        self._free[memory.shape[0]].append(memory)

    def clear(self) -> None:
        """Let go of what is free."""
        for free in self._free.values():
            free.clear()
