"""Whether a worker still works: told its pulses, its steps and the time, it says what is wrong.

A worker is frozen when it is busy with a step and its progress counter stands longer than
max(1 s, 5 x the predicted time of one count), so that a long legal prefill is no death and a hang
is seen within a second; it is silent when its actor thread sends no pulses. Loading is not
judged here. Predictions are learnt from finished steps: a base and a slope by tokens.
"""

from __future__ import annotations

MIN_PATIENCE_S = 1.0
PATIENCE_FACTOR = 5.0
SILENCE_S = 5.0
FIRST_STEP_S = 10.0
"""What the first steps of a kind may take a count: kernels are chosen, memory is touched."""
FIRST_TOKEN_S = 0.05
"""And this much more for each token of theirs."""
LARGE_STEP = 64
"""Tokens from which on a step tells something about the slope."""
_SMOOTHING = 0.2


class StepTimes:
    """Predicts the seconds of a step by its number of tokens."""

    __slots__ = ("_base", "_slope")

    def __init__(self) -> None:
        self._base = -1.0
        self._slope = -1.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if num_tokens < LARGE_STEP:
            self._base = _smooth(self._base, seconds)
        else:
            self._slope = _smooth(self._slope, seconds / num_tokens)

    def predict(self, num_tokens: int) -> float | None:
        """Seconds; None where no step of that kind was seen."""
        if num_tokens < LARGE_STEP:
            return self._base if self._base >= 0 else None
        return max(self._base, 0.0) + self._slope * num_tokens if self._slope >= 0 else None


class WorkerVigil:
    """Watches one ready worker. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.times = StepTimes()
        self.heard_at = now
        self._checked_at = now
        self._counter = -1
        self._moved_at = now
        self._busy_pulse = False
        self._num_steps = 0
        self._first_counter = -1
        self._step_tokens = 0

    def sent(self, num_tokens: int, now: float) -> None:
        """A step with so many tokens went to the worker."""
        self._step_tokens = num_tokens
        self._moved_at = now

    def result(self, seconds: float, now: float) -> None:
        """The step came back; 0 seconds: it failed, and tells nothing of time."""
        if seconds > 0:
            self.times.add(self._step_tokens, seconds)
        self._num_steps += 1
        self._step_tokens = 0
        self.heard_at = self._moved_at = now

    def pulse(self, counter: int, busy: bool, now: float) -> None:
        """The worker's actor thread speaks."""
        self.heard_at = now
        self._busy_pulse = busy
        if self._first_counter < 0:
            self._first_counter = counter
        if counter != self._counter:
            self._counter = counter
            self._moved_at = now

    def patience_s(self) -> float:
        """How long the counter may stand during the step under way."""
        predicted = self.times.predict(self._step_tokens)
        if predicted is None:
            return FIRST_STEP_S + FIRST_TOKEN_S * self._step_tokens
        counts = (self._counter - self._first_counter) / self._num_steps if self._num_steps else 1.0
        return max(MIN_PATIENCE_S, PATIENCE_FACTOR * predicted / max(counts, 1.0))

    def verdict(self, now: float) -> str:
        """What is wrong, or "". After a pause of this process itself nothing is: words of the
        worker may still wait to be read."""
        paused = now - self._checked_at > MIN_PATIENCE_S
        self._checked_at = now
        if paused:
            self.heard_at = max(self.heard_at, now)
            self._moved_at = max(self._moved_at, now)
            return ""
        if now - self.heard_at > SILENCE_S:
            return f"the worker has been silent for {now - self.heard_at:.1f} s"
        stood_s = now - self._moved_at
        if self._step_tokens and self._busy_pulse and stood_s > self.patience_s():
            return f"a step has not moved for {stood_s:.1f} s"
        return ""


def _smooth(old: float, new: float) -> float:
    return new if old < 0 else old + _SMOOTHING * (new - old)
