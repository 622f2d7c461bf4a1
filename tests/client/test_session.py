"""The pure core of the client: who hears what, once, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.client.retries import RETRY_BURST
from xllm.client.session import ClientSession
from xllm.errors import BadMessageError, BrokenError, ConflictError, DeadlineError, OverloadedError
from xllm.protocol.client import BadMessage
from xllm.protocol.generation import (
    AbortRequest,
    RequestFailed,
    RequestFinished,
    SubmitRequest,
    TokenDelta,
    Usage,
)
from xllm.protocol.questions import ModelList


class Recorder:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.ends: list[object] = []
        self.errors: list[Exception] = []

    def on_delta(self, delta):
        assert not self.ends
        assert not self.errors
        self.deltas.append(delta)

    def on_end(self, message):
        self.ends.append(message)

    def on_error(self, error):
        self.errors.append(error)

    @property
    def num_ends(self) -> int:
        return len(self.ends) + len(self.errors)


def open_one(session, request_id, recorder, now, timeout_s, **fields):
    """A submit that went to the router at once."""
    message = SubmitRequest(id=request_id, prompt=(1,), **fields)
    session.open(message, recorder, now, timeout_s).is_sent = True


def opened(timeout_s=10.0, **fields):
    session = ClientSession()
    recorder = Recorder()
    request_id = session.next_id()
    open_one(session, request_id, recorder, 0.0, timeout_s, **fields)
    return session, recorder, request_id


def finished(request_id):
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return RequestFinished(id=request_id, request_id="r", choices=(), usage=usage)


def test_deltas_then_one_end():
    session, recorder, key = opened()
    session.receive(TokenDelta(id=key, token_ids=(5, 6)))
    session.receive(TokenDelta(id=key, first_index=2, token_ids=(7,)))
    session.receive(TokenDelta(id=key, text="tail"))
    session.receive(finished(key))
    session.receive(finished(key))
    session.receive(TokenDelta(id=key, first_index=3, token_ids=(8,)))
    assert [d.token_ids for d in recorder.deltas] == [(5, 6), (7,), ()]
    assert recorder.num_ends == 1
    assert session.statistics().num_late == 2
    session.check()


def test_a_token_is_heard_once():
    session, recorder, key = opened()
    for _ in range(2):
        session.receive(TokenDelta(id=key, token_ids=(5,)))
    assert len(recorder.deltas) == 1
    assert session.statistics().num_late == 1


def test_lost_tokens_fail_the_request():
    session, recorder, key = opened()
    assert session.receive(TokenDelta(id=key, first_index=1, token_ids=(5,))) == AbortRequest(
        id=key
    )
    assert isinstance(recorder.errors[0], BadMessageError)
    session.check()


def test_choices_count_apart():
    session, recorder, key = opened()
    session.receive(TokenDelta(id=key, choice=0, token_ids=(5,)))
    session.receive(TokenDelta(id=key, choice=1, token_ids=(5,)))
    assert len(recorder.deltas) == 2


def test_failure_has_its_class_and_fields():
    session, recorder, key = opened()
    session.receive(
        RequestFailed(id=key, code="overloaded", message="full", param="x", retry_after_ms=1500)
    )
    error = recorder.errors[0]
    assert isinstance(error, OverloadedError)
    assert (error.message, error.param, error.retry_after_s) == ("full", "x", 1.5)


def test_a_code_from_the_future_is_still_an_error():
    session, recorder, key = opened()
    session.receive(RequestFailed(id=key, code="not_yet_known", message="m"))
    assert recorder.errors[0].message == "m"


def test_time_over():
    session, recorder, key = opened(timeout_s=2.0)
    assert session.expire(1.9) == []
    assert session.expire(2.0) == [AbortRequest(id=key)]
    assert isinstance(recorder.errors[0], DeadlineError)
    assert session.expire(3.0) == []


def test_forgotten_requests_hear_nothing():
    session, recorder, key = opened()
    assert session.forget(key) == AbortRequest(id=key)
    assert session.forget(key) is None
    session.receive(finished(key))
    assert recorder.num_ends == 0


def test_a_lost_connection_fails_all_with_errors_of_their_own():
    session, first, _ = opened()
    second = Recorder()
    open_one(session, session.next_id(), second, 0.0, 1.0)
    session.fail_all(BrokenError("gone"))
    assert isinstance(first.errors[0], BrokenError)
    assert first.errors[0] is not second.errors[0]
    assert session.num_open == 0


def test_bad_message_fails_those_that_heard_nothing():
    session, heard, key = opened()
    unheard = Recorder()
    open_one(session, session.next_id(), unheard, 0.0, 1.0)
    session.receive(TokenDelta(id=key, token_ids=(5,)))
    session.receive(BadMessage(message="?"))
    assert isinstance(unheard.errors[0], BadMessageError)
    assert heard.num_ends == 0


def test_a_number_is_open_once():
    session, _, key = opened()
    with pytest.raises(ConflictError):
        open_one(session, key, Recorder(), 0.0, 1.0)


def test_timers_do_not_pile_up():
    session = ClientSession()
    for _ in range(5000):
        key = session.next_id()
        open_one(session, key, Recorder(), 0.0, 600.0)
        session.receive(finished(key))
    assert len(session._timers) < 200


def test_what_was_lost_often_holds_up_nobody_else():
    session = ClientSession()

    def all_due() -> list[int]:
        found = []
        while (one := session.due(0.0)) is not None:
            one[0].is_sent = True
            found.append(one[1].id)
        return found

    often = [session.next_id() for _ in range(200)]
    for key in often:
        open_one(session, key, Recorder(), 0.0, 600.0)
    session.lost("first")
    assert all_due() == often
    session.lost("second")
    late = session.next_id()
    entry = session.open(SubmitRequest(id=late, prompt=(1,)), Recorder(), 0.0, 600.0)
    session.waits(late)
    found = all_due()
    assert found[0] == late
    assert entry.is_sent
    assert len(found) == 1 + int(RETRY_BURST)
    assert not session.must_wait(SubmitRequest(id=session.next_id(), prompt=(1,)))
    session.check()


EVENTS = st.one_of(
    st.tuples(st.just("open"), st.floats(0.1, 5)),
    st.tuples(st.just("ask"), st.floats(0.1, 5)),
    st.tuples(st.just("delta"), st.integers(1, 12), st.integers(0, 3)),
    st.tuples(st.just("finished"), st.integers(1, 12)),
    st.tuples(st.just("failed"), st.integers(1, 12)),
    st.tuples(st.just("refused"), st.integers(1, 12)),
    st.tuples(st.just("models"), st.integers(1, 12)),
    st.tuples(st.just("forget"), st.integers(1, 12)),
    st.tuples(st.just("wait"), st.floats(0, 2)),
    st.tuples(
        st.just("lost"),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.integers(1, 3))
def test_any_history_ends_each_request_once(events, num_routers):
    session = ClientSession()
    session.num_routers = num_routers
    recorders: dict[int, Recorder] = {}
    forgotten: set[int] = set()
    now = 0.0
    for event in events:
        match event:
            case ("open", timeout_s):
                key = session.next_id()
                recorders[key] = Recorder()
                open_one(session, key, recorders[key], now, timeout_s, model="ab"[key % 2])
            case ("ask", timeout_s):
                key = session.next_id()
                recorders[key] = Recorder()
                message = SubmitRequest(id=key, model="ab"[key % 2], prompt=(1,))
                entry = session.open(message, recorders[key], now, timeout_s)
                if session.must_wait(message):
                    session.waits(key)
                else:
                    entry.is_sent = True
            case ("delta", key, index):
                session.receive(TokenDelta(id=key, first_index=index, token_ids=(index,)))
            case ("finished", key):
                session.receive(finished(key))
            case ("failed", key):
                session.receive(RequestFailed(id=key, code="engine_error", message="m"))
            case ("refused", key):
                session.receive(RequestFailed(id=key, code="unavailable", message="m"))
            case ("models", key):
                session.receive(ModelList(id=key, models=()))
            case ("forget", key):
                if session.forget(key):
                    forgotten.add(key)
            case ("wait", time_s):
                now += time_s
                session.expire(now)
                if session.is_turned_away(now):
                    session.lost("no instance")
                while (one := session.due(now)) is not None:
                    assert not session._refusals.holds(one[1])
                    one[0].is_sent = True
                waiting = {key for key, entry in session._open.items() if not entry.is_sent}
                known = {*session._unsent, *session._paced, *session._withheld}
                assert waiting <= known | {key for key in waiting if key in session._refusals}
            case _:
                session.fail_all(BrokenError("gone"))
        session.check()
    session.expire(now + 10)
    assert session.num_open == 0
    assert not session.is_turned_away(now + 10)
    for key, recorder in recorders.items():
        assert recorder.num_ends == (0 if key in forgotten else 1)
        assert [d.first_index for d in recorder.deltas] == list(range(len(recorder.deltas)))
