"""How long a fault of a worker may last unseen, whatever the phases of pulses and looks are, and
on a machine whose CPUs are taken; and what is no fault there."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.test_vigil import decodes
from xllm.master.rank_link import RankLink
from xllm.master.step_times import StepWork
from xllm.master.vigil import CHECK_PERIOD_S, LATE_S
from xllm.protocol.actor.starvation import CpuTimes, StarvationMeter, ThreadTimes
from xllm.protocol.step import PULSE_PERIOD_S, WorkerReady

STEP_S = 0.02
LOCK_S = 0.005
"""A thread that waits for the interpreter looks so often."""
LOOK_S = 30e-6
THEFT_S = 0.05
PID = 7
DESIGNED_S = 1.5
"""The longest time that a fault of short steps may be unseen beside two busy cores: the bound that
faults are held to is 2 s."""


@dataclasses.dataclass
class SilentWorker:
    """It ran short steps until its interpreter was held, at 0 s. Its actor thread says nothing
    from then on; its engine thread waits for the interpreter. `share`: of their time without a
    CPU; `computes`: whether what holds the interpreter wants one; `stolen`: the share that the
    hypervisor takes of a CPU, and the engine thread's for THEFT_S from `theft_at` on."""

    share: float
    computes: bool
    stolen: float = 0.0
    theft_at: float = 9.0

    def read(self, now: float) -> CpuTimes:
        """What the kernel says of its two threads."""
        wants_s = now if self.computes else 0.0
        slice_s = 0.004
        holder = ThreadTimes(
            wants_s * (1 - self.share), wants_s * self.share, int(wants_s / slice_s), self.computes
        )
        runs_s = now - min(THEFT_S, max(0.0, now - self.theft_at))
        num_looks = int(runs_s * (1 - self.share) / LOCK_S)
        waiter = ThreadTimes(num_looks * LOOK_S, runs_s * self.share, num_looks, False)
        return CpuTimes({PID: holder, PID + 1: waiter}, {"cpu0": now * self.stolen})


def watched(worker: SilentWorker, clock: list[float]) -> RankLink:
    """A worker that has run steps of 20 ms and runs another."""
    link = RankLink(0, "w0", lambda pid: StarvationMeter(lambda: worker.read(clock[0])))
    link.become_ready(WorkerReady(0, "m", 8, 16, 128, 320, (), "", "", device="cpu"), -1.0)
    assert link.vigil is not None
    link.vigil.times.add(StepWork.of(decodes(4)), STEP_S, STEP_S)
    return link


def look_until(link: RankLink, clock: list[float], late_s: float, at_most_s: float) -> float:
    """Looks, each so late, until there is a verdict."""
    while clock[0] < at_most_s:
        clock[0] += CHECK_PERIOD_S + late_s
        denied_s = link.look(clock[0], PID)
        if link.verdict(clock[0], PID, 60.0, denied_s):
            return clock[0]
    return at_most_s


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.0, STEP_S),
    st.floats(0.0, CHECK_PERIOD_S),
    st.floats(0.0, 0.03),
    st.floats(0, 0.6),
    st.floats(0, 0.9),
    st.floats(0, 1.5),
)
def test_a_held_interpreter_is_seen_in_time_beside_busy_cores(
    ago_s, phase_s, late_s, share, stolen, theft_at
):
    clock = [phase_s - CHECK_PERIOD_S]
    link = watched(SilentWorker(share, False, stolen, theft_at), clock)
    link.vigil.pulse(1, True, -ago_s)
    link.vigil.sent(decodes(4), -ago_s)
    assert look_until(link, clock, late_s, 9.0) < DESIGNED_S


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.0, PULSE_PERIOD_S),
    st.floats(0.0, CHECK_PERIOD_S),
    st.floats(0.0, 0.03),
    st.floats(0, 0.9),
)
def test_a_step_that_computes_is_waited_for_beside_busy_cores(ago_s, phase_s, late_s, share):
    """0.6 s of a CPU, with the interpreter held: 6 s where nine tenths of the CPUs are taken."""
    clock = [phase_s - CHECK_PERIOD_S]
    link = watched(SilentWorker(share, computes=True), clock)
    link.vigil.pulse(1, True, -ago_s)
    link.vigil.sent(decodes(4), -ago_s)
    ends = 0.6 / (1 - share)
    assert look_until(link, clock, late_s, ends) >= ends


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.0, PULSE_PERIOD_S),
    st.floats(0.0, CHECK_PERIOD_S),
    st.floats(0.0, 0.02),
    st.floats(0, 0.05),
)
def test_a_step_that_stands_still_is_seen_in_time(pulse_s, phase_s, late_s, share):
    """Its actor thread goes on with pulses; its threads are denied a CPU for moments."""
    clock = [phase_s - CHECK_PERIOD_S]
    link = watched(SilentWorker(share, computes=False), clock)
    link.vigil.pulse(1, True, 0.0)
    link.vigil.sent(decodes(4), 0.0)
    pulse_at = pulse_s
    while clock[0] < 9.0:
        clock[0] += CHECK_PERIOD_S + late_s
        while pulse_at <= clock[0]:
            link.vigil.pulse(1, True, pulse_at, share * pulse_at)
            pulse_at += PULSE_PERIOD_S + late_s
        if link.verdict(clock[0], PID, 60.0, 0.0):
            break
    assert clock[0] < DESIGNED_S


def test_what_was_seen_before_a_word_says_nothing_of_the_silence_after_it():
    made = []

    def make(pid: int) -> StarvationMeter:
        made.append(StarvationMeter(lambda: CpuTimes({}, {})))
        return made[-1]

    link = RankLink(0, "w0", make)
    link.become_ready(WorkerReady(0, "m", 8, 16, 128, 320, (), "", "", device="cpu"), 0.0)
    for now in (LATE_S + 0.01, LATE_S + 0.11):
        link.look(now, PID)
    assert len(made) == 1
    # The master itself was away: it has looked at no time at which nothing was late.
    link.vigil.pulse(1, True, 0.6)
    link.look(0.6 + LATE_S + 0.01, PID)
    assert len(made) == 2
