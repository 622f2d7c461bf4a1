"""When a child starts again, and when the launcher gives up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.cli.supervision import (
    MAX_CRASHES,
    QUARANTINE_S,
    WINDOW_S,
    GiveUp,
    Quarantine,
    Restart,
    RestartPolicy,
)
from xllm.errors import error_from_exit_code


def test_delays_double_until_it_is_given_up():
    policy = RestartPolicy()
    steps = [policy.exited(-9, float(i), was_ready=True, needed=True) for i in range(MAX_CRASHES)]
    assert steps[:4] == [Restart(0.0), Restart(0.5), Restart(1.0), Restart(2.0)]
    assert isinstance(steps[4], GiveUp)
    assert steps[4].exit_code == 70


def test_old_crashes_are_forgotten():
    policy = RestartPolicy()
    for i in range(20):
        step = policy.exited(70, i * WINDOW_S, was_ready=True, needed=True)
        assert step == Restart(0.0)


def test_a_child_that_worked_for_a_while_starts_again_at_once():
    policy = RestartPolicy()
    steps = [policy.exited(-9, t, was_ready=True, needed=True) for t in (0.0, 10.0, 15.0, 25.0)]
    assert steps == [Restart(0.0), Restart(0.0), Restart(1.0), Restart(0.0)]


def test_a_child_that_never_was_ready_is_not_started_at_once():
    policy = RestartPolicy()
    steps = [policy.exited(70, float(i), was_ready=False, needed=True) for i in range(3)]
    assert steps == [Restart(0.5), Restart(1.0), Restart(2.0)]


def test_a_fenced_process_starts_at_once():
    assert RestartPolicy().exited(75, 0.0, was_ready=True, needed=True) == Restart(0.0)


@pytest.mark.parametrize(
    ("code", "was_ready", "given_up"),
    [
        (64, True, True),
        (64, False, True),
        (69, False, True),
        (69, True, False),
        (71, False, True),
        (71, True, False),
        (70, False, False),
        (0, True, False),
    ],
)
def test_what_another_try_would_not_help(code, was_ready, given_up):
    step = RestartPolicy().exited(code, 0.0, was_ready=was_ready, needed=True)
    assert isinstance(step, GiveUp) is given_up
    if given_up:
        assert step.exit_code == code


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-9, 70, 75, 71, 0]), st.floats(0, 20)), max_size=40))
def test_never_more_than_five_starts_a_minute(events):
    policy = RestartPolicy()
    now = 0.0
    restarts: list[float] = []
    for code, pause in events:
        now += pause
        step = policy.exited(code, now, was_ready=True, needed=True)
        if isinstance(step, GiveUp):
            break
        assert 0 <= step.delay_s <= 30
        restarts.append(now)
        assert len([t for t in restarts if now - t < WINDOW_S]) < MAX_CRASHES


def test_a_child_that_is_not_needed_is_tried_again_slowly():
    policy = RestartPolicy()
    steps = [policy.exited(-9, float(i), was_ready=True, needed=False) for i in range(MAX_CRASHES)]
    assert steps[-1] == Quarantine(QUARANTINE_S, "5 ends within 60 s")
    assert policy.quarantined
    for i in range(1, 10):
        again = policy.exited(-9, 4 + i * QUARANTINE_S, was_ready=True, needed=False)
        assert again == Quarantine(QUARANTINE_S)  # and no second line about it
    later = policy.exited(-9, 4 + 9 * QUARANTINE_S + WINDOW_S, was_ready=True, needed=False)
    assert later == Restart(0.0)
    assert not policy.quarantined


@pytest.mark.parametrize("code", [64, 69, 71])
def test_what_cannot_start_leaves_the_service_alone(code):
    policy = RestartPolicy()
    step = policy.exited(code, 0.0, was_ready=False, needed=False)
    assert isinstance(step, Quarantine)
    assert step.reason


def test_a_child_in_quarantine_that_is_needed_now_ends_the_service():
    policy = RestartPolicy()
    for i in range(MAX_CRASHES):
        policy.exited(-9, float(i), was_ready=True, needed=False)
    assert isinstance(policy.exited(-9, 5.0, was_ready=True, needed=True), GiveUp)


@pytest.mark.parametrize(
    ("ended_with", "exit_code"),
    [(64, 64), (69, 69), (70, 70), (71, 71), (75, 75), (0, 70), (-9, 70), (1, 70), (143, 70)],
)
def test_an_exit_code_gives_an_error_with_it_and_an_unknown_one_a_fault(ended_with, exit_code):
    error = error_from_exit_code(ended_with, "it ended")
    assert (error.exit_code, error.message) == (exit_code, "it ended")
