"""Faults that a test asks the toy engine for: by constructor only, never by wire."""

from __future__ import annotations

import dataclasses
import threading

from xllm.errors import EngineError


@dataclasses.dataclass(frozen=True)
class ToyFaults:
    """Token ids that do harm when an item's share of a step holds one; -1: none.

    `fail_item`: that item is reported as failed. `fail_step`: the whole step raises. `hang`: the
    step stands still, its progress counter too, until `released` is set."""

    fail_item: int = -1
    fail_step: int = -1
    hang: int = -1
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def harm(self, tokens: list[int]) -> None:
        """Do what these tokens of an item ask for."""
        if self.hang in tokens:
            self.released.wait()
        if self.fail_step in tokens:
            raise RuntimeError("toy fault: the step fails")
        if self.fail_item in tokens:
            raise EngineError("toy fault: the item fails")


NO_FAULTS = ToyFaults()
"""The engine as it is outside of fault tests."""
