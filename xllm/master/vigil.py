"""Whether a worker still works: told its pulses, its plans and the time, it says what is wrong.

A worker is frozen when it is busy with a step and its progress counter stands longer than
max(1 s, 5 x the longest time that it stood in steps of that kind); before any of the kind has
finished, than 5 x the predicted time of the whole step. A long step is never a fault while the
counter moves. Of several plans at the worker the oldest is the one that runs: it is judged, from
when it was sent or the one before it came back. A worker is silent when its actor thread sends
no pulses. If its threads are awake all the while, something holds the interpreter, and the silence
is judged as a standing counter is, by what the whole step should take. Loading is not judged.

Looked at every CHECK_PERIOD_S, a worker of short steps is given up: stopped, HUSH_S after its last
word; held, HELD_S after it; standing, 1 s and a pulse after its counter moved; at the next look.

Time in which threads of the worker wanted a CPU and got none is not time in which it stood or
was silent, up to MOST_DENIED_S: on a machine with too much to do a worker is slow, not frozen.
"""

from __future__ import annotations

from collections import deque

from xllm.master.step_times import MIN_PATIENCE_S, PATIENCE_FACTOR, StepTimes, StepWork
from xllm.protocol.step import PULSE_PERIOD_S, StepPlan

CHECK_PERIOD_S = 0.1
"""How often a master asks for verdicts."""
SILENCE_S = 25 * PULSE_PERIOD_S
"""Without a word for so long a worker is given up, whatever it may be doing."""
LATE_S = 1.5 * PULSE_PERIOD_S
"""After so long without a word it is watched for want of CPU, and for whether it is awake: what
its threads were denied before that excuses nothing."""
HUSH_S = 3.5 * PULSE_PERIOD_S
"""After so long without a word a stopped process is given up at once."""
PROOF_S = 5 * PULSE_PERIOD_S
"""A pulse older than this proves nothing any more."""
HELD_S = MIN_PATIENCE_S + PULSE_PERIOD_S
"""So much of a silence may pass at least in a step of a worker that is awake: what a counter may
stand, from the pulse that did not come."""
HELD_LOOKS = 5
"""So many of the last looks (starvation.RECENT_LOOKS) must have found it awake. Between two of them
words that waited were read: a master that was itself without CPU blames nobody."""
MOST_DENIED_S = 60.0
"""So much of a stand or silence is excused by want of CPU: a bound for threads that hang and
spin on a machine whose CPUs are all taken."""
BRIEF_S = 0.05
"""Steps shorter than this are many and alike."""
_LOOK_PERIOD_S = 0.1
"""One of them is learnt from in this time."""


class WorkerVigil:
    """Watches one ready worker. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.times = StepTimes()
        self.heard_at = now
        self._checked_at = now
        self._learnt_at = -1.0
        self._plans: deque[StepPlan] = deque()  # the first of them runs
        self._counter = -1
        self._moved_at = now
        self._busy_pulse = False
        # Whether a pulse has shown the counter where it was since it moved. Without one nobody
        # knows that it stood: pulses may have been late.
        self._was_seen_standing = False
        self._gap_s = 0.0
        self._denied_s = 0.0  # as the last pulse said, and as at three earlier times
        self._denied_at_move = 0.0
        self._denied_at_begin = 0.0
        self._silence_denied_s = 0.0
        self._num_awake = 0

    @property
    def denied_s(self) -> float:
        """How long threads got no CPU in the stand or the silence under way."""
        return max(self._denied_s - self._denied_at_move, self._silence_denied_s)

    def sent(self, plan: StepPlan, now: float) -> None:
        """A plan went to the worker."""
        self._plans.append(plan)
        if len(self._plans) == 1:
            self._begin(now)

    def result(self, seconds: float, now: float) -> None:
        """The oldest step came back; 0 seconds: it failed, and tells nothing of time."""
        plan = self._plans.popleft() if self._plans else None
        if plan is not None and seconds > 0:
            self._note_gap(now)
            # What it takes where there is CPU.
            seconds = max(seconds - (self._denied_s - self._denied_at_begin), self._gap_s, 1e-9)
            if seconds > BRIEF_S or now - self._learnt_at > _LOOK_PERIOD_S:
                self._learnt_at = now
                self.times.add(StepWork.of(plan), seconds, min(self._gap_s, seconds))
        self._heard(now)
        self._begin(now)

    def pulse(self, counter: int, busy: bool, now: float, denied_s: float = 0.0) -> None:
        """The worker's actor thread speaks. `denied_s`: how long its threads got no CPU while
        the counter stood, since its start."""
        self._heard(now)
        self._busy_pulse = busy
        self._denied_s = denied_s
        if counter != self._counter:
            self._counter = counter
            self._note_gap(now)
            self._moved_at = now
            self._denied_at_move = denied_s
        elif busy:
            self._was_seen_standing = True

    def patience_s(self) -> float:
        """How long the counter may stand during the step under way."""
        if not self._plans:
            return MIN_PATIENCE_S
        learnt_s = self.times.patience_s(StepWork.of(self._plans[0]))
        return max(learnt_s, PATIENCE_FACTOR * self._gap_s)

    def shows_work(self, now: float) -> bool:
        """Whether a step is under way and its pulses prove that the engine computes."""
        if not self._plans or now - self.heard_at > PROOF_S:
            return False
        return self._stood_s(0.0) <= self.patience_s()

    def is_late(self, now: float) -> bool:
        """Whether a pulse is missing."""
        return now - self.heard_at > LATE_S

    def is_hushed(self, now: float) -> bool:
        """Whether a step is under way and pulses are missing."""
        return bool(self._plans) and now - self.heard_at > HUSH_S

    def explain_silence(self, denied_s: float, num_awake: int = 0) -> None:
        """Since it fell silent the worker's threads got no CPU for so long, and so many of the last
        looks at it found it awake."""
        self._silence_denied_s = denied_s
        self._num_awake = num_awake

    def verdict(self, now: float, denied_s: float = 0.0) -> str:
        """What is wrong, or "". `denied_s`: how long a worker that this one waits for got no CPU.
        After a pause of this process itself nothing is wrong: words of the worker may still
        wait to be read."""
        paused = now - self._checked_at > MIN_PATIENCE_S
        self._checked_at = now
        if paused:
            self.heard_at = max(self.heard_at, now)
            self._moved_at = max(self._moved_at, now)
            self._denied_at_move = self._denied_s
            return ""
        silent_s = now - self.heard_at
        unexcused_s = silent_s - min(self._silence_denied_s, MOST_DENIED_S)
        if unexcused_s > SILENCE_S:
            return f"the worker has been silent for {silent_s:.1f} s"
        if unexcused_s > HELD_S and self._is_held(unexcused_s):
            return f"the worker is awake in a step and has been silent for {silent_s:.1f} s"
        stood_s = self._stood_s(denied_s)
        if not self._plans or not self._busy_pulse or stood_s <= MIN_PATIENCE_S:
            return ""
        if stood_s > self.patience_s():
            return f"a step has not moved for {stood_s:.1f} s"
        return ""

    def _is_held(self, silent_s: float) -> bool:
        """Whether a silence of so long is a fault of a worker that is awake."""
        if not self._plans or self._num_awake < HELD_LOOKS:
            return False
        expected_s = self.times.expect(StepWork.of(self._plans[0]))
        return expected_s is not None and silent_s > PATIENCE_FACTOR * expected_s

    def _stood_s(self, denied_s: float) -> float:
        """How long the counter stood although there was CPU, as far as pulses show it: what was
        not heard is silence."""
        own_s = self._denied_s - self._denied_at_move
        return self.heard_at - self._moved_at - min(max(own_s, denied_s), MOST_DENIED_S)

    def _heard(self, now: float) -> None:
        self.heard_at = now
        self._silence_denied_s = 0.0
        self._num_awake = 0

    def _begin(self, now: float) -> None:
        """The oldest plan runs from now on, if there is one."""
        self._moved_at = now
        self._denied_at_move = self._denied_at_begin = self._denied_s
        self._was_seen_standing = False
        self._gap_s = 0.0

    def _note_gap(self, now: float) -> None:
        if self._was_seen_standing:
            self._was_seen_standing = False
            gap_s = now - self._moved_at - (self._denied_s - self._denied_at_move)
            self._gap_s = max(self._gap_s, gap_s)
