"""Small results on their way from a device to the host, and how they travel on a CPU.

A copy holds what its tensor had when it was begun: what is started on the device behind it may
overwrite the tensor, so that a step can begin before the results of the last one were read.
"""

from __future__ import annotations

from typing import Protocol

import torch


class HostCopy(Protocol):
    """One tensor on its way."""

    def is_done(self) -> bool:
        """Whether it is on the host; any thread may ask."""

    def wait(self) -> torch.Tensor:
        """The tensor on the host, its caller's own, once it is there. One thread waits for a copy.
        Raises EngineError where the device failed."""


class HostCopier(Protocol):
    """Begins copies. One thread uses it, and not while it captures a graph."""

    def copy(self, tensor: torch.Tensor) -> HostCopy:
        """Begin to copy `tensor`, as it will be behind all that was started on the current stream.
        Nothing waits. Raises EngineError."""

    def close(self) -> None:
        """Wait for the copies under way and let their memory go. Later calls do nothing."""


class FinishedCopy:
    """A copy that was there at once."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def is_done(self) -> bool:
        """It is."""
        return True

    def wait(self) -> torch.Tensor:
        """It."""
        return self._tensor


class InstantCopier:
    """A CPU's."""

    def copy(self, tensor: torch.Tensor) -> FinishedCopy:
        """A copy of `tensor` as it is."""
        return FinishedCopy(tensor.clone())

    def close(self) -> None:
        """Nothing is under way."""
