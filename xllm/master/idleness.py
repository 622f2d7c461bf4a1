"""How long the worker stood between two steps while there was work: fed with results.

Knows no clock: the worker measures the gap before each step, and the scheduler says whether
anything waited or ran when the step before was settled. A gap without work is nobody's fault.
"""

from __future__ import annotations

from xllm.protocol.step import StepResult


class IdleMeter:
    """Totals since the start, in nanoseconds."""

    __slots__ = ("_had_work", "busy_ns", "idle_ns")

    def __init__(self) -> None:
        self.busy_ns = 0
        self.idle_ns = 0
        self._had_work = False

    def note(self, result: StepResult, has_work: bool) -> None:
        """A step was settled; `has_work`: something waits or runs after it."""
        self.busy_ns += result.duration_ns
        if self._had_work:
            self.idle_ns += result.idle_ns
        self._had_work = has_work
