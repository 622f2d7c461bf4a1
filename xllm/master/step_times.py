"""What steps take: how much a plan asks for, and how long the counter stood in plans like it.

Pure. Plans of a model are of one kind where tokens, tokens times context, and rows through the
head each agree to a factor of two. Of each kind that ran it keeps the longest time that the
worker's counter stood, and what a whole step took; a kind that never ran is predicted from those
that did.
Invariant: a prediction errs towards too long, since a worker must not be killed for legal work.
"""

from __future__ import annotations

import dataclasses

from xllm.protocol.step import ItemKind, StepPlan

MIN_PATIENCE_S = 1.0
MAX_PATIENCE_S = 600.0
PATIENCE_FACTOR = 5.0
FIRST_STEP_S = 10.0
"""What a worker's first steps may take: kernels are chosen, memory is touched."""
FIRST_WORK_S = 0.05
"""And this much more for each unit of their work."""
CONTEXT_UNIT = 1024
"""Attending to so many tokens counts as much as all else that a token needs: more than it costs
anywhere, as it must, since predictions go from short contexts to long ones."""
ROW_WORK = 4
"""A row through the head and the sampler counts as so many tokens."""
_SMOOTHING = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class StepWork:
    """How much a step computes, in units of a token without context, its kind and its model."""

    amount: float
    kind: tuple[str, int, int, int]

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        """The work of a plan. Looks at every item."""
        tokens = attended = rows = 0
        verify = ItemKind.VERIFY
        for item in plan.items:
            num = item.num_tokens
            tokens += num
            attended += num * (item.start + num)
            every = item.score_prompt or item.kind == verify
            rows += item.num_samples + (num if every else 0)
        amount = tokens + attended / CONTEXT_UNIT + ROW_WORK * rows
        kind = (plan.model, tokens.bit_length(), attended.bit_length(), rows.bit_length())
        return cls(max(amount, 1.0), kind)


class StepTimes:
    """What is known of finished steps, by kind. Seconds."""

    __slots__ = ("_gaps", "_steps")

    def __init__(self) -> None:
        self._gaps: dict[tuple[str, int, int, int], float] = {}
        self._steps: dict[tuple[str, int, int, int], tuple[float, float]] = {}

    def add(self, work: StepWork, seconds: float, gap_s: float) -> None:
        """A step took so long, and its counter stood for `gap_s` at most."""
        kind = work.kind
        self._gaps[kind] = max(gap_s, self._gaps.get(kind, 0.0))
        amount, known = self._steps.get(kind, (work.amount, seconds))
        self._steps[kind] = (
            amount + _SMOOTHING * (work.amount - amount),
            known + _SMOOTHING * (seconds - known),
        )

    def predict(self, work: StepWork) -> float | None:
        """Seconds of a whole step: at most what a larger one took, or a smaller one in
        proportion. None where no step of the model was seen."""
        seen = [
            seconds * max(1.0, work.amount / amount)
            for kind, (amount, seconds) in self._steps.items()
            if kind[0] == work.kind[0]
        ]
        return min(seen, default=None)

    def expect(self, work: StepWork) -> float | None:
        """Seconds of a whole step: what its kind took of late, else as predicted."""
        known = self._steps.get(work.kind)
        if known is None:
            return self.predict(work)
        amount, seconds = known
        return seconds * max(1.0, work.amount / amount)

    def patience_s(self, work: StepWork) -> float:
        """How long the counter may stand in such a step."""
        gap_s = self._gaps.get(work.kind)
        if gap_s is not None:
            return max(MIN_PATIENCE_S, PATIENCE_FACTOR * gap_s)
        predicted = self.predict(work)
        if predicted is None:
            return min(FIRST_STEP_S + FIRST_WORK_S * work.amount, MAX_PATIENCE_S)
        return min(max(MIN_PATIENCE_S, PATIENCE_FACTOR * predicted), MAX_PATIENCE_S)
