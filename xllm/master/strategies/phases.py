"""Which kinds of work share a step: decodes and prefills together, or each on their own."""

from __future__ import annotations

import enum
from typing import Protocol

PREFILL_STREAK = 16
"""Prefill steps in a row at most while decodes wait, where prefills go first."""
DECODE_STREAK = 8
"""Decode steps in a row at most while a prefill could run, where decodes go first."""


class StepKind(enum.Enum):
    """What a step is to hold. PREFILL: decodes only if no prefill can go; DECODE: no prefill."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class StepPhases(Protocol):
    """Decides the kind of each step."""

    def choose(self, has_decodes: bool, has_prefills: bool) -> StepKind:
        """The kind of the next step, given what could run or wants to start."""
        ...

    def note(self, kind: StepKind, others_wait: bool) -> None:
        """A step of this kind was planned; `others_wait`: work of the other kind was left."""
        ...


class MixedSteps:
    """Decodes first, prefills in what is left of the budget."""

    def choose(self, has_decodes: bool, has_prefills: bool) -> StepKind:
        """Always both."""
        return StepKind.MIXED

    def note(self, kind: StepKind, others_wait: bool) -> None:
        """Nothing to remember."""


class PureSteps:
    """A step holds one kind of work. The preferred kind goes first, `max_streak` times in a row
    at most while the other waits."""

    __slots__ = ("_max_streak", "_preferred", "_streak")

    def __init__(self, preferred: StepKind, max_streak: int) -> None:
        self._preferred = preferred
        self._max_streak = max_streak
        self._streak = 0

    def choose(self, has_decodes: bool, has_prefills: bool) -> StepKind:
        """The preferred kind unless there is none of it, or it had its turns."""
        if not has_decodes:
            return StepKind.PREFILL
        if not has_prefills:
            return StepKind.DECODE
        if self._streak < self._max_streak:
            return self._preferred
        return StepKind.DECODE if self._preferred is StepKind.PREFILL else StepKind.PREFILL

    def note(self, kind: StepKind, others_wait: bool) -> None:
        """Count the turns. A turn that the other kind could not use is offered again."""
        self._streak = self._streak + 1 if kind is self._preferred and others_wait else 0


def prefill_first() -> StepPhases:
    """Prompts before tokens: decodes wait PREFILL_STREAK steps at most."""
    return PureSteps(StepKind.PREFILL, PREFILL_STREAK)


def decode_first() -> StepPhases:
    """Tokens before prompts: prompts wait DECODE_STREAK steps at most once they could run."""
    return PureSteps(StepKind.DECODE, DECODE_STREAK)
