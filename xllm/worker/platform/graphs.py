"""Graphs of a device as the engine sees them: work that was recorded once and is launched whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class CapturedGraph(Protocol):
    """Recorded work. It reads and writes the tensors that it was recorded with."""

    def replay(self) -> None:
        """Launch it on the current stream. Raises EngineError."""

    def close(self) -> None:
        """Let it go, once the device is done with it. Later calls do nothing."""


class GraphDevice(Protocol):
    """Records work. All graphs of one share a memory pool: what one leaves in it the next one may
    overwrite, so results that are read later live in tensors made outside of a capture."""

    def capture(self, run: Callable[[], None]) -> CapturedGraph:
        """Record what `run` starts. `run` is called twice, first for real, so that whatever is made
        at a first call (compiled kernels, workspaces) is there; it must not wait for the device.
        Raises EngineError where it cannot be recorded; the current stream is usable then."""

    def close(self) -> None:
        """Let every graph of it go. Later calls do nothing."""
