"""What is left of a step for prefills: tokens, and time where the step has a limit.

Numbers only. Invariants: never more tokens than the step may have; the first prefill of a step
gets at least MIN_CHUNK tokens of those, however little time is left, so that prompts always end.
"""

from __future__ import annotations

from xllm.master.strategies.step_model import StepTimeModel

MIN_CHUNK = 16
"""Smaller chunks are not worth their step, but for the last one of a prompt."""
DEFAULT_LIMIT_S = 1.0
"""What a step may take, where no setting says otherwise."""


class StepBudget:
    """One step's. `seconds`: what prefills may add to it; None: as long as they take.
    `is_first_free`: the first one may take as long as it does, since nobody waits for the step
    who would gain by its being cut; those behind it still join only within the time."""

    __slots__ = ("_is_first_free", "_model", "_seconds", "num_prefills", "tokens")

    def __init__(
        self,
        tokens: int,
        model: StepTimeModel,
        seconds: float | None,
        is_first_free: bool = False,
    ) -> None:
        self.tokens = tokens
        self.num_prefills = 0
        self._model = model
        self._seconds = seconds
        self._is_first_free = is_first_free

    def allowed(self, start: int, remaining: int) -> int:
        """The most tokens for a prefill that has `start` of its tokens and lacks `remaining`;
        0: none in this step."""
        most = min(remaining, self.tokens)
        is_free = self._is_first_free and not self.num_prefills
        if self._seconds is None or is_free or most <= 0:
            return max(most, 0)
        chunk = self._model.largest_chunk(self._seconds, start, most)
        least = min(MIN_CHUNK, most)
        if chunk < least:
            return 0 if self.num_prefills else least
        return chunk

    def take(self, start: int, num: int) -> None:
        """A prefill gets `num` tokens."""
        self.tokens -= num
        self.num_prefills += 1
        if self._seconds is not None:
            self._seconds -= self._model.prefill_s(start, num) or 0.0
