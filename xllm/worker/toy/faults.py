"""Faults that a test asks the toy engine for: by constructor only, never by wire."""

from __future__ import annotations

import dataclasses
import threading


@dataclasses.dataclass(frozen=True)
class ToyFaults:
    """Token ids that do harm when an item's share of a step holds one; -1: none.

    `fail_item`: that item is reported as failed. `fail_step`: the whole step raises. `hang`: the
    step stands still, its progress counter too, until `released` is set."""

    fail_item: int = -1
    fail_step: int = -1
    hang: int = -1
    released: threading.Event = dataclasses.field(default_factory=threading.Event)


NO_FAULTS = ToyFaults()
"""The engine as it is outside of fault tests."""
