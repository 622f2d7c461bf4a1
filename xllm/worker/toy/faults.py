"""Faults that a test or `xllm chaos` asks the toy engine for: by its constructor or by settings,
never by wire."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence

from xllm.errors import ConfigError, EngineError

SLOW_S = 8.0
"""Time of a step that is slow and lawful: its progress counter moves."""
_EXIT_CODE = 70
_NAMES = ("slow", "hang", "crash")


@dataclasses.dataclass(frozen=True)
class ToyFaults:
    """Token ids that do harm when an item's share of a step holds one; -1: none.

    `fail_item`: that item is reported as failed. `fail_step`: the whole step raises. `hang`: the
    step stands still, its progress counter too, until `released` is set. `slow`: the step takes
    SLOW_S. `crash`: the process ends at once."""

    fail_item: int = -1
    fail_step: int = -1
    hang: int = -1
    slow: int = -1
    crash: int = -1
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def harm(self, tokens: Sequence[int]) -> float:
        """Do what these tokens of an item ask for; returns the seconds that the step shall take
        beyond its own."""
        if self.crash in tokens:
            os._exit(_EXIT_CODE)
        if self.hang in tokens:
            self.released.wait()
        if self.fail_step in tokens:
            raise RuntimeError("toy fault: the step fails")
        if self.fail_item in tokens:
            raise EngineError("toy fault: the item fails")
        return SLOW_S if self.slow in tokens else 0.0


NO_FAULTS = ToyFaults()
"""The engine as it is outside of fault tests."""


def parse_faults(text: str) -> ToyFaults:
    """The faults that `chaos.toy_faults` names; ConfigError for what is none."""
    if not text:
        return NO_FAULTS
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in _NAMES or not number.isdecimal():
            raise ConfigError(
                f"chaos.toy_faults: {part!r} is none of {', '.join(_NAMES)} with a token id",
                param="chaos.toy_faults",
            )
        found[name] = int(number)
    return ToyFaults(
        slow=found.get("slow", -1), hang=found.get("hang", -1), crash=found.get("crash", -1)
    )
