"""What a chaos run is asked for, and what its cluster looks like."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import click

MAX_SLACK = 100


class FiniteRange(click.FloatRange):
    """A number within bounds; `nan` is in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or BadParameter that says the bounds."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


@dataclasses.dataclass(frozen=True)
class ChaosOptions:
    """One run. `streams`: that many are in the middle of their tokens at each fault."""

    engine: str = "toy"
    instances: int = 2
    routers: int = 2
    streams: int = 32
    tokens: int = 200
    step_ms: float = 20.0
    """Of a toy step: each stream gets a token in that time."""
    seconds: float = 60.0
    registry: str = "embedded"
    """embedded, or the address of one that runs."""
    model: str = ""
    """Directory or hub id; empty: the bundled demo model."""
    seed: int = 0
    slack: float = 1.0
    """Bounds of times are multiplied by it: for machines that do other things, too."""
    repeats: int = 1
    """Each fault comes so often at least."""
    phase_s: float = 0.0
    """A fault waits for a random part of this time."""
    flags: tuple[str, ...] = ()
    """Further flags of `xllm serve`."""
    keep: bool = False
    """Leave the directory with logs behind."""

    @property
    def num_loops(self) -> int:
        """Requests kept open: some of them are between two streams at any time."""
        return self.streams + max(4, self.streams // 4)
