"""Whether a worker works, judged from pulses: long legal steps live, hangs are seen."""

import os
import signal
import subprocess
import time

import pytest

from xllm.master.process_state import is_process_stopped
from xllm.master.rank_link import RankLink
from xllm.master.step_times import FIRST_STEP_S, StepTimes, StepWork
from xllm.master.vigil import (
    CHECK_PERIOD_S,
    HELD_S,
    HUSH_S,
    LATE_S,
    MOST_DENIED_S,
    PROOF_S,
    SILENCE_S,
    WorkerVigil,
)
from xllm.protocol.bus import WorkerState
from xllm.protocol.step import PULSE_PERIOD_S, StepItem, StepPlan, WorkerFailed, WorkerReady

STEP = 0.1


def plan_of(*items: StepItem) -> StepPlan:
    return StepPlan(1, tuple(items))


def prefill(num_tokens, start=0, score=False) -> StepPlan:
    return plan_of(StepItem(1, 0, start, num_tokens, (), 1, score))


def decodes(num, context=100) -> StepPlan:
    return plan_of(*(StepItem(seq, 1, context, 1) for seq in range(num)))


class Watched:
    """A vigil with its worker: pulses and verdicts each tenth of a second of its own time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.counter = 0
        self.denied_s = 0.0
        self.vigil = WorkerVigil(self.now)
        self.verdicts: list[str] = []

    def tick(
        self, *, moves: bool, busy: bool = True, silent: bool = False, denied: float = 0.0
    ) -> str:
        """`denied`: the share of this time in which the worker got no CPU."""
        self.now += STEP
        self.counter += moves
        self.denied_s += denied * STEP
        if not silent:
            self.vigil.pulse(self.counter, busy, self.now, self.denied_s)
        self.verdicts.append(self.vigil.verdict(self.now))
        return self.verdicts[-1]

    def run(self, plan: StepPlan, seconds: float, stands_s: float = 0.0) -> None:
        """A step whose counter moves, but for its last `stands_s`."""
        self.vigil.sent(plan, self.now)
        began = self.now
        while self.now < began + seconds - STEP / 2:
            self.tick(moves=self.now < began + seconds - stands_s - STEP / 2)
        self.counter += 1
        self.vigil.result(max(seconds, 0.01), self.now)
        assert not any(self.verdicts), self.verdicts

    def hang(self, plan: StepPlan, at_most_s: float = 60.0) -> float:
        """Seconds until a step whose counter never moves is seen."""
        self.vigil.sent(plan, self.now)
        began = self.now
        while not self.tick(moves=False):
            assert self.now < began + at_most_s
        return self.now - began


def test_a_hang_is_seen_within_a_second_or_so_after_short_steps():
    one = Watched()
    for _ in range(3):
        one.run(prefill(10), 0.0)
        one.run(decodes(4), 0.0)
        one.tick(moves=False, busy=False)
    assert 0.9 < one.hang(decodes(4)) < 1.4
    assert one.verdicts[-1].startswith("a step has not moved")


def test_a_hang_in_a_kind_of_step_that_never_ran_is_judged_by_the_others():
    one = Watched()
    one.run(prefill(512), 1.0)
    assert one.hang(prefill(16)) < 5.0 + 0.3


def test_of_two_plans_the_older_is_judged_and_then_the_other():
    one = Watched()
    for _ in range(3):
        one.run(decodes(4), 0.0)
    one.vigil.sent(decodes(4), one.now)
    one.tick(moves=True)
    one.vigil.sent(decodes(4), one.now)
    for _ in range(8):
        assert not one.tick(moves=False)
    # The first comes back late: the patience with the second begins here.
    one.vigil.result(0.9, one.now)
    began = one.now
    while not one.tick(moves=False):
        assert one.now < began + 10
    assert one.now - began > 0.9
    one.vigil.result(0.1, one.now)
    one.vigil.result(0.1, one.now)
    assert not one.vigil.shows_work(one.now)


def test_a_long_legal_prefill_is_no_death():
    one = Watched()
    one.run(prefill(100), 4.0)
    one.run(prefill(2000), 80.0)
    one.run(prefill(2000), 300.0)


def test_many_decodes_of_a_large_vocabulary_are_no_death():
    one = Watched()
    for _ in range(5):
        one.run(decodes(1), 0.1)
    one.run(decodes(256), 1.8, stands_s=1.8)
    one.run(decodes(256), 1.8, stands_s=1.8)


def test_scoring_a_prompt_is_no_death():
    one = Watched()
    one.run(prefill(10), 0.1)
    one.run(prefill(2048), 4.0, stands_s=0.3)
    one.run(prefill(2048, score=True), 12.3, stands_s=8.3)


def test_a_chunk_behind_a_long_context_is_no_death_after_short_prompts():
    one = Watched()
    for _ in range(3):
        one.run(prefill(10), 0.1)
        one.run(prefill(500), 1.0)
    one.run(prefill(2048, start=36_000), 23.0, stands_s=23.0)


def test_patience_is_five_times_the_longest_time_that_the_counter_stood():
    one = Watched()
    one.run(prefill(500), 4.0, stands_s=0.6)
    one.run(prefill(500), 4.0, stands_s=1.0)
    one.run(prefill(500), 4.0)
    assert 4.9 < one.hang(prefill(500)) < 6.2


def test_a_step_that_stood_long_just_now_may_do_so_again():
    one = Watched()
    one.run(decodes(1), 0.1)
    one.vigil.sent(decodes(1), one.now)
    for _ in range(8):
        one.tick(moves=False)
    one.tick(moves=True)
    for _ in range(20):
        one.tick(moves=False)
    assert not any(one.verdicts)


def test_late_pulses_are_not_taken_for_a_standing_counter():
    one = Watched()
    for _ in range(10):
        one.vigil.sent(decodes(1), one.now)
        for _ in range(7):
            one.tick(moves=True, silent=True)
        one.tick(moves=True)
        one.vigil.result(0.8, one.now)
    assert one.hang(decodes(1)) < 1.4


def test_a_failed_step_teaches_nothing():
    one = Watched()
    one.vigil.sent(prefill(10), one.now)
    one.vigil.result(0.0, one.now)
    one.vigil.sent(prefill(10), one.now)
    assert one.vigil.patience_s() >= FIRST_STEP_S


def test_an_idle_worker_may_stand_still_but_not_be_silent():
    one = Watched()
    for _ in range(200):
        one.tick(moves=False, busy=False)
    assert not any(one.verdicts)
    began = one.now
    while not one.tick(moves=False, silent=True):
        assert not one.vigil.is_hushed(one.now)
    assert SILENCE_S <= one.now - began < SILENCE_S + 0.3
    assert "silent" in one.verdicts[-1]


def test_the_bound_of_silence_is_many_pulses():
    assert SILENCE_S >= 5.0 >= 10 * PULSE_PERIOD_S
    assert PULSE_PERIOD_S < LATE_S < HUSH_S
    assert 0.6 < HUSH_S < PROOF_S == 1.0


def test_a_worker_that_falls_silent_in_a_step_is_looked_at_within_a_second():
    one = Watched()
    one.run(decodes(1), 0.1)
    one.vigil.sent(decodes(1), one.now)
    began = one.now
    while not one.vigil.is_hushed(one.now):
        assert one.tick(moves=False, silent=True) == ""
    assert HUSH_S <= one.now - began < 1.0


def test_pulses_of_a_moving_step_are_a_proof_of_work():
    one = Watched()
    assert not one.vigil.shows_work(one.now)
    one.vigil.sent(prefill(100), one.now)
    for _ in range(30):
        one.tick(moves=True)
    assert one.vigil.shows_work(one.now)
    assert not one.vigil.shows_work(one.now + PROOF_S + STEP)
    one.vigil.result(3.0, one.now)
    assert not one.vigil.shows_work(one.now)


def test_after_a_pause_of_the_master_nobody_is_blamed():
    vigil = WorkerVigil(0.0)
    vigil.verdict(0.2)
    assert vigil.verdict(60.0) == ""
    assert vigil.verdict(60.2) == ""


def trained() -> Watched:
    one = Watched()
    for _ in range(3):
        one.run(decodes(4), 0.0)
    return one


def test_a_worker_without_cpu_is_slow_and_not_frozen():
    one = trained()
    one.vigil.sent(decodes(4), one.now)
    for _ in range(100):
        assert one.tick(moves=False, denied=0.95) == ""
    assert one.vigil.shows_work(one.now)


def test_a_hang_beside_a_busy_machine_is_seen_once_it_stood_a_second_of_its_own():
    """A thread that waits for ever wants no CPU; one that spins gets its share."""
    for denied, at_most_s in ((0.05, 1.4), (0.5, 2.5), (0.9, 12.5)):
        one = trained()
        one.vigil.sent(decodes(4), one.now)
        began = one.now
        while not one.tick(moves=False, denied=denied):
            assert one.now - began < at_most_s
        assert one.now - began > 0.9


def test_want_of_cpu_excuses_a_minute_and_no_more():
    one = trained()
    one.vigil.sent(decodes(4), one.now)
    began = one.now
    while not one.tick(moves=False, denied=1.0):
        assert one.now - began < MOST_DENIED_S + 2
    assert one.now - began > MOST_DENIED_S


def test_what_was_denied_before_the_counter_moved_excuses_nothing_after():
    one = trained()
    one.vigil.sent(decodes(4), one.now)
    for _ in range(100):
        assert one.tick(moves=False, denied=1.0) == ""
    one.tick(moves=True)
    began = one.now
    while not one.tick(moves=False):
        assert one.now - began < 1.4


def test_a_busy_machine_teaches_no_patience():
    one = trained()
    for _ in range(3):
        one.vigil.sent(decodes(4), one.now)
        for _ in range(80):
            one.tick(moves=False, denied=1.0)
        one.tick(moves=True)
        one.vigil.result(8.0, one.now)
    assert one.hang(decodes(4)) < 1.4
    assert one.vigil.times.predict(StepWork.of(decodes(4))) < 1.0


def test_a_silent_worker_without_cpu_is_waited_for():
    one = trained()
    one.vigil.sent(decodes(4), one.now)
    for tenths in range(100):
        one.tick(moves=False, silent=True)
        if one.vigil.is_late(one.now):
            one.vigil.explain_silence(STEP * (tenths - 9))
    assert not any(one.verdicts)
    for _ in range(60):
        one.tick(moves=False, silent=True)
    assert "silent" in one.verdicts[-1]


def silent(one: Watched, at_most_s: float, num_awake: int, denied: float = 0.0) -> float:
    """Seconds until a silent worker is given up, looked at as often as a master does."""
    began = one.now
    while not one.tick(moves=False, silent=True):
        silent_s = one.now - began
        assert silent_s < at_most_s
        looks = max(0, int((silent_s - LATE_S) / CHECK_PERIOD_S))
        one.vigil.explain_silence(denied * silent_s, min(looks, num_awake))
    return one.now - began


def test_a_worker_whose_interpreter_is_held_in_a_step_is_seen_sooner():
    one = trained()
    one.vigil.sent(decodes(4), one.now)
    assert HELD_S < silent(one, 2.0, num_awake=100) < 1.4
    assert "awake in a step" in one.verdicts[-1]


@pytest.mark.parametrize(
    ("plan", "num_awake", "denied"),
    [
        (None, 100, 0.0),  # nothing that a client waits for
        (decodes(4), 1, 0.0),  # it sleeps: a disk, say
        (prefill(500), 100, 0.0),  # a step that may take that long
        (decodes(4), 100, 0.8),  # it gets no CPU
    ],
)
def test_other_silence_is_waited_for(plan, num_awake, denied):
    one = trained()
    one.run(prefill(500), 1.0)
    if plan is not None:
        one.vigil.sent(plan, one.now)
    at_most_s = 5.3 if not denied else 9.0
    assert silent(one, at_most_s, num_awake, denied) > 4.9


def test_before_any_step_has_ended_an_awake_worker_is_waited_for():
    one = Watched()
    one.vigil.sent(decodes(4), one.now)
    assert silent(one, 5.3, num_awake=100) > 4.9


@pytest.mark.parametrize("starves", [True, False])
def test_ranks_wait_for_the_one_without_cpu(starves):
    links = [RankLink(rank, f"w{rank}") for rank in range(2)]
    now, denied_s = 100.0, 0.0
    for link in links:
        link.vigil = WorkerVigil(now)
        link.vigil.times.add(StepWork.of(decodes(4)), 0.01, 0.0)
        link.vigil.sent(decodes(4), now)
    verdicts = []
    for _ in range(30):
        now += STEP
        denied_s += STEP * starves
        links[0].vigil.pulse(1, True, now)
        links[1].vigil.pulse(1, True, now, denied_s)
        most_s = max(link.look(now, 0) for link in links)
        verdicts += [link.verdict(now, 0, 60.0, most_s) for link in links]
    assert any(verdicts) != starves


def test_a_rank_says_its_state():
    link = RankLink(0, "w0")
    link.begin(1.0)
    assert link.state(2.0) == WorkerState("w0", "starting")
    link.identity = b"w"
    assert link.state(2.0) == WorkerState("w0", "loading")
    link.become_ready(WorkerReady(0, "m", 8, 16, 128, 320, (), "", "", device="cpu"), 3.0)
    assert link.state(3.5) == WorkerState("w0", "ready", 500, "cpu")
    link.failure = WorkerFailed(0, "unavailable", "no model")
    link.forget(4.0)
    assert link.state(5.0) == WorkerState("w0", "failed")
    link.begin(5.0)
    assert link.state(5.0).state != "failed"


def test_predictions_go_up_in_proportion_and_down_not_at_all():
    times = StepTimes()
    assert times.predict(StepWork.of(decodes(1))) is None
    small, large = StepWork.of(prefill(100)), StepWork.of(prefill(1000))
    times.add(small, 1.0, 0.0)
    assert abs(times.predict(large) - large.amount / small.amount) < 1e-9
    assert times.predict(StepWork.of(prefill(2))) == 1.0
    times.add(large, 4.0, 0.0)
    assert times.predict(StepWork.of(prefill(500))) == 4.0


def test_a_stopped_process_is_told_from_others():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not is_process_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while not is_process_stopped(process.pid):
            assert time.monotonic() < deadline
        process.kill()
    assert not is_process_stopped(process.pid)
