"""Circuit breakers of instances."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.policy_questions import instance
from xllm.errors import error_classes
from xllm.router.admission.breaker import FAILURES, CircuitBreakers

A, B = instance("a"), instance("b")


def breakers(**more: float) -> CircuitBreakers:
    return CircuitBreakers(
        more.get("failures", 3), more.get("window_s", 10.0), more.get("open_s", 5.0)
    )


def names(found) -> list[str]:
    return [one.name for one in found]


def fail(one: CircuitBreakers, times: int, start: float = 0.0, name: str = "a") -> float:
    for k in range(times):
        one.ended(name, f"r{k}", "engine_error", start + k)
    return start + times - 1


def test_failures_open_it_and_a_trial_closes_it():
    one = breakers()
    now = fail(one, 2)
    assert names(one.passable([A, B], now)) == ["a", "b"]
    now = fail(one, 1, 2.0)
    assert (one.state("a", now), one.num_opened) == ("open", 1)
    assert names(one.passable([A, B], 6.9)) == ["b"]
    assert one.state("a", 7.0) == "half-open"
    assert names(one.passable([A, B], 7.0)) == ["a", "b"]
    one.sent("a", "trial", 7.0)
    assert names(one.passable([A, B], 7.0)) == ["b"]
    one.ended("a", "older", "", 7.1)  # sent before it opened: no verdict
    assert one.state("a", 7.2) == "half-open"
    one.ended("a", "trial", "", 7.5)
    assert one.state("a", 7.5) == "closed"
    assert names(one.passable([A, B], 7.5)) == ["a", "b"]


def test_a_long_trial_lets_another_through_once_it_answers():
    one = breakers()
    fail(one, 3)
    one.answers("a", "r0")  # no trial
    for number, at in enumerate((8.0, 9.0, 10.0)):
        assert names(one.passable([A, B], at)) == ["a", "b"]
        one.sent("a", f"t{number}", at)
        assert names(one.passable([A, B], at)) == ["b"]
        one.answers("a", f"t{number}")
        assert one.state("a", at) == "half-open"
    one.left("a", "t0")
    one.ended("a", "t0", "", 11.0)  # it had left: no verdict
    assert one.state("a", 11.0) == "half-open"
    one.ended("a", "t2", "", 11.0)
    assert one.state("a", 11.0) == "closed"


@pytest.mark.parametrize("failed", ["t1", "t2", ""])
def test_any_failed_trial_opens_it_again(failed):
    one = breakers()
    fail(one, 3)
    one.sent("a", "t1", 8.0)
    one.answers("a", "t1")
    one.sent("a", "t2", 8.5)
    one.ended("a", "old", "engine_error", 8.6)
    assert one.state("a", 8.6) == "half-open"
    if failed:
        one.ended("a", failed, "engine_error", 9.0)
    else:
        one.died("a", 9.0)
    assert (one.state("a", 18.9), one.state("a", 19.0)) == ("open", "half-open")
    one.ended("a", "t1", "", 20.0)  # it belongs to the trial before
    assert one.state("a", 20.0) == "half-open"


def test_a_failed_trial_opens_it_for_longer():
    one = breakers()
    now = fail(one, 3)
    for length in (5, 10, 20, 40, 40):
        assert one.state("a", now + length - 0.1) == "open"
        now += length
        assert one.state("a", now) == "half-open"
        one.sent("a", "trial", now)
        one.ended("a", "trial", "engine_error", now)
    assert one.num_opened == 6


def test_a_trial_without_a_verdict_makes_room_for_another():
    one = breakers()
    fail(one, 3)
    one.sent("a", "t1", 8.0)
    one.left("a", "t1")
    assert names(one.passable([A, B], 8.0)) == ["a", "b"]
    one.sent("a", "t2", 8.0)
    one.died("a", 8.1)
    assert one.state("a", 8.2) == "open"


@pytest.mark.parametrize("code", sorted({code for code in error_classes() if code not in FAILURES}))
def test_what_is_no_fault_of_the_instance_never_opens_it(code):
    one = breakers()
    for k in range(50):
        one.ended("a", f"r{k}", code, float(k))
    assert one.state("a", 50.0) == "closed"
    assert one.num_opened == 0


def test_bad_requests_are_no_failures():
    classes = error_classes()
    assert {"engine_error", "worker_lost", "internal_error"} <= FAILURES
    assert all(classes[code].http_status >= 500 for code in FAILURES)


def test_one_fault_of_many_requests_counts_once():
    one = breakers()
    for k in range(200):
        one.ended("a", f"r{k}", "worker_lost", 1.0 + k * 1e-4)
    assert one.state("a", 1.1) == "closed"
    one.died("a", 3.0)
    one.died("a", 5.0)
    assert one.state("a", 5.0) == "open"


def test_old_failures_are_forgotten():
    one = breakers()
    fail(one, 2)
    one.ended("a", "r", "engine_error", 20.0)
    assert one.state("a", 20.0) == "closed"
    one.forget(25.0)
    one.ended("a", "r", "engine_error", 21.0)
    one.ended("a", "r", "engine_error", 22.0)
    assert one.state("a", 22.0) == "open"


def test_an_instance_that_mostly_works_stays():
    one = breakers()
    one.ended("a", "r", "engine_error", 0.0)
    for k in range(10):
        one.ended("a", f"r{k}", "", 0.5)
    fail(one, 3, 1.0)
    assert one.state("a", 4.0) == "closed"


def test_where_all_are_open_all_are_used():
    one = breakers()
    fail(one, 3, name="a")
    fail(one, 3, name="b")
    assert names(one.passable([A, B], 3.0)) == ["a", "b"]
    assert names(one.passable([A], 3.0)) == ["a"]


def test_none_is_opened_where_they_are_off():
    one = breakers(failures=0)
    fail(one, 50)
    assert one.state("a", 50.0) == "closed"


def test_what_is_long_past_is_dropped():
    one = breakers()
    fail(one, 3)
    one.forget(13.0)
    assert one.state("a", 13.0) == "half-open"
    one.forget(200.0)
    assert one.state("a", 200.0) == "closed"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("ill", "well", "sent", "answers", "left", "died", "forget")),
        st.sampled_from("ab"),
        st.sampled_from(("r1", "r2")),
        st.floats(0, 4),
    ),
    max_size=60,
)


@given(EVENTS)
def test_somebody_is_always_left_and_one_trial_waits_for_a_token_at_most(events):
    one = breakers()
    now = 0.0
    for kind, name, request_id, pause in events:
        now += pause
        if kind == "ill":
            one.ended(name, request_id, "engine_error", now)
        elif kind == "well":
            one.ended(name, request_id, "", now)
        elif kind == "sent":
            passable = {found.name for found in one.passable([A, B], now)}
            both = {one.state(each, now) for each in "ab"}
            one.sent(name, request_id, now)
            if name in passable and one.state(name, now) == "half-open" and "closed" in both:
                assert name not in names(one.passable([A, B], now))
        elif kind == "answers":
            one.answers(name, request_id)
        elif kind == "left":
            one.left(name, request_id)
        elif kind == "died":
            one.died(name, now)
        else:
            one.forget(now)
        assert one.passable([A, B], now)
