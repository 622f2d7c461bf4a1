"""Who hears this router: who answers, who does not any more, and who never did."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm.router.hearing import MIN_PATIENCE_S, MISSED_ANSWERS, RECONNECT_S, Hearing

PERIOD_S = 0.2
PATIENCE_S = MISSED_ANSWERS * PERIOD_S


def hearing(*names: str) -> Hearing:
    """Each connected, asked and answered at 0."""
    one = Hearing(PERIOD_S)
    for name in names:
        one.connected(name)
        one.asked(name, 0.0)
        assert not one.answered(name)
    assert one.tick(0.0) == ()
    return one


def run_until(one: Hearing, begin: float, end: float, answering: tuple[str, ...] = ()) -> list[str]:
    """Ask and tick ten times a second; returns who became deaf."""
    found: list[str] = []
    for step in range(1, round((end - begin) * 10) + 1):
        now = begin + step / 10
        for name in one.to_ask:
            one.asked(name, now)
        for name in answering:
            one.answered(name)
        found += one.tick(now)
    return found


def test_three_unanswered_periods_are_deafness_and_one_answer_ends_it():
    one = hearing("a", "b")
    assert run_until(one, 0.0, 0.6, ("b",)) == []
    assert run_until(one, 0.6, 5.0, ("b",)) == ["a"]
    assert one.to_ask == ("a", "b")
    assert one.answered("a")
    assert not one.answered("a")
    assert run_until(one, 5.0, 7.0, ("b",)) == ["a"]


def test_who_stays_deaf_is_worth_a_new_connection():
    one = hearing("a", "b")
    assert run_until(one, 0.0, RECONNECT_S, ("b",)) == ["a"]
    assert one.hopeless(RECONNECT_S) == ()
    assert one.hopeless(RECONNECT_S + 0.2) == ("a",)
    one.answered("a")
    assert one.hopeless(RECONNECT_S + 0.2) == ()


def test_who_never_answered_is_not_judged_and_not_asked_again():
    one = Hearing(PERIOD_S)
    one.connected("old")
    one.asked("old", 0.0)
    assert run_until(one, 0.0, 9.0) == []
    assert one.to_ask == one.hopeless(9.0) == ()


def test_a_new_connection_begins_anew():
    one = hearing("a")
    assert run_until(one, 0.0, 2.0) == ["a"]
    one.connected("a")
    assert not one.answered("a")
    assert run_until(one, 2.0, 4.0) == ["a"]
    one.gone("a")
    one.gone("a")
    one.asked("a", 4.0)
    assert not one.answered("a")
    assert run_until(one, 4.0, 6.0) == []


def test_a_connection_that_never_carried_a_word_is_judged_by_the_one_before():
    one = hearing("a")
    one.gone("a")
    one.connected("a")
    assert run_until(one, 0.0, 2.0) == ["a"]
    one.forget("a")
    one.connected("a")
    one.asked("a", 2.0)
    assert run_until(one, 2.0, 4.0) == []


def test_after_a_pause_of_the_router_nobody_is_deaf():
    one = hearing("a")
    one.asked("a", 0.1)
    assert one.tick(0.1) == ()
    assert one.tick(5.0) == ()
    assert run_until(one, 5.0, 5.5) == []
    assert run_until(one, 5.5, 6.0) == ["a"]


def test_a_short_period_leaves_a_busy_machine_time():
    one = Hearing(0.01)
    one.connected("a")
    one.asked("a", 0.0)
    one.answered("a")
    one.asked("a", 0.0)
    ticks = [(now / 100, one.tick(now / 100)) for now in range(round(MIN_PATIENCE_S * 100) + 3)]
    assert [now > MIN_PATIENCE_S for now, found in ticks if found] == [True]


EVENTS = ("ask", "answer", "link", "go", "forget")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(EVENTS))))
def test_only_who_answered_and_owes_an_answer_is_deaf(events):
    one = Hearing(PERIOD_S)
    owed: dict[str, float | None] = {}
    answers: set[str] = set()
    deaf: set[str] = set()
    for step, (name, event) in enumerate(events):
        now = step * 0.15
        if event == "link":
            one.connected(name)
            owed[name] = None
            deaf.discard(name)
        elif event == "go":
            one.gone(name)
            owed.pop(name, None)
        elif event == "forget":
            one.forget(name)
            owed.pop(name, None)
            answers.discard(name)
        elif event == "ask":
            one.asked(name, now)
            if name in owed and owed[name] is None:
                owed[name] = now
        else:
            assert one.answered(name) == (name in owed and name in deaf)
            if name in owed:
                owed[name] = None
                answers.add(name)
                deaf.discard(name)
        found = one.tick(now)
        late = {
            key
            for key, since in owed.items()
            if since is not None and now - since > PATIENCE_S and key in answers and key not in deaf
        }
        assert set(found) == late
        deaf |= late
        assert set(one.to_ask) == {key for key in owed if key in answers}
