"""Routers without an instance: who is refused by one asks the next, and nobody else does."""

from __future__ import annotations

import asyncio

import pytest

from tests.client.fake_router import FakeRouter
from tests.client.test_async_client import until
from tests.client.test_failover import read_all, with_routers
from tests.client.test_session import Recorder, finished, open_one
from xllm.client import refusals
from xllm.client.refusals import JUDGED_IN_S, Refusals, is_worth_another
from xllm.client.retries import MAX_LOSSES, RETRY_BURST
from xllm.client.session import ClientSession
from xllm.errors import BrokenError, OverloadedError, UnavailableError
from xllm.protocol.generation import RequestFailed, SubmitRequest, TokenDelta
from xllm.protocol.questions import ListModels


def refusal(request_id: int = 1, code: str = "unavailable") -> RequestFailed:
    return RequestFailed(id=request_id, code=code, message="as told")


# -- what is decided ------------------------------------------------------------------------------


def test_only_a_want_of_instances_is_worth_another_router():
    submit = SubmitRequest(id=1, prompt=(1,))
    assert is_worth_another(submit, refusal(), 0, 2)
    assert not is_worth_another(submit, refusal(), 1, 2)
    assert not is_worth_another(submit, refusal(), 0, 1)
    assert is_worth_another(submit, refusal(), MAX_LOSSES - 1, 64)
    assert not is_worth_another(submit, refusal(), MAX_LOSSES, 64)
    assert not is_worth_another(ListModels(id=1), refusal(), 0, 2)
    for code in ("overloaded", "rate_limit_exceeded", "invalid_value", "engine_error", "aborted"):
        assert not is_worth_another(submit, refusal(code=code), 0, 2)
    everywhere = RequestFailed(id=1, code="unavailable", message="asleep", everywhere=True)
    assert not is_worth_another(submit, everywhere, 0, 2)


def test_what_a_router_refuses_is_told_after_a_moment_for_each_model():
    refused = Refusals()
    assert refused.judged(0.0) == {}
    refused.add(1, "a", UnavailableError("none"))
    assert refused.judged(1.0) == {}
    refused.add(2, "a", UnavailableError("none"))
    refused.add(3, "b", UnavailableError("none"))
    assert refused.judged(1.0 + JUDGED_IN_S / 2) == {}
    assert list(refused.judged(1.0 + JUDGED_IN_S)) == [1, 2]
    assert (1 in refused, 3 in refused, len(refused)) == (False, True, 1)
    refused.add(4, "a", UnavailableError("none"))
    assert list(refused.judged(1.0 + JUDGED_IN_S)) == []  # its time begins anew
    assert list(refused.judged(1.0 + 1.5 * JUDGED_IN_S)) == [3]
    assert not refused.drop(3)
    assert refused.drop(4)
    assert len(refused) == 0


def submit_for(session: ClientSession, model: str) -> SubmitRequest:
    return SubmitRequest(id=session.next_id(), model=model, prompt=(1,))


def test_only_the_model_that_was_refused_waits():
    session, other, recorder = ClientSession(), Recorder(), Recorder()
    session.num_routers = 2
    open_one(session, session.next_id(), other, 0.0, 10.0, model="b")
    open_one(session, session.next_id(), recorder, 0.0, 10.0, model="a")
    session.receive(refusal(2))
    wanted = [submit_for(session, "a"), submit_for(session, "b"), ListModels(id=session.next_id())]
    assert [session.must_wait(one) for one in wanted] == [True, False, False]
    for one in wanted:  # as if the connection had been gone, say
        session.open(one, Recorder(), 0.0, 10.0)
        session.waits(one.id)
    assert [one.id for one in all_due(session)] == [wanted[1].id, wanted[2].id]
    assert not session.is_turned_away(1.0)
    assert not session.is_turned_away(1.0 + JUDGED_IN_S)
    assert isinstance(recorder.errors[0], UnavailableError)
    assert [one.id for one in all_due(session)] == [wanted[0].id]
    session.check()


@pytest.mark.parametrize("end", ["forget", "abort", "loss", "time"])
def test_what_waited_for_a_refusal_is_asked_for_once_that_is_none(end):
    session, _ = refused_session(1, deadline=5.0)
    later = submit_for(session, "")
    assert session.must_wait(later)
    session.open(later, Recorder(), 0.0, 10.0)
    session.waits(later.id)
    assert all_due(session) == []
    if end == "forget":
        session.forget(1)
    elif end == "abort":
        session.abort(1)
    elif end == "time":
        session.expire(6.0)
    else:
        session.lost("no instance")
    expected = [1, later.id] if end == "loss" else [later.id]
    assert [one.id for one in all_due(session)] == expected
    assert not session.must_wait(submit_for(session, ""))
    session.check()


def refused_session(
    num_requests: int, num_routers: int = 2, deadline: float = 10.0
) -> tuple[ClientSession, list[Recorder]]:
    session = ClientSession()
    session.num_routers = num_routers
    recorders = [Recorder() for _ in range(num_requests)]
    for recorder in recorders:
        key = session.next_id()
        open_one(session, key, recorder, 0.0, deadline)
        session.receive(refusal(key))
    session.check()
    return session, recorders


def all_due(session: ClientSession) -> list[SubmitRequest]:
    found = []
    while (one := session.due(1.0)) is not None:
        one[0].is_sent = True
        found.append(one[1])
    return found


def test_the_next_router_is_asked_as_if_for_the_first_time():
    session, recorders = refused_session(3)
    assert session.must_wait(submit_for(session, ""))
    assert session.due(0.0) is None  # not of this router
    assert session.is_turned_away(0.0)
    session.lost("no instance")
    found = all_due(session)
    assert [one.resume for one in found] == [None] * 3
    assert [one.timeout_ms for one in found] == [9000] * 3
    for one in found:
        session.receive(refusal(one.id))  # the last router that there is
    assert [type(one.errors[0]) for one in recorders] == [UnavailableError] * 3
    assert session.statistics().num_resumed == 0
    session.check()


def test_what_was_refused_twice_waits_for_the_budget():
    session, recorders = refused_session(200, num_routers=3)
    session.lost("no instance")
    for one in all_due(session):
        session.receive(refusal(one.id))
    session.lost("no instance")
    assert len(all_due(session)) == RETRY_BURST
    assert not any(one.errors for one in recorders)
    session.check()


def test_what_was_begun_or_lost_is_not_asked_for_anew():
    for before in ("delta", "lost", "abort"):
        session, recorder = ClientSession(), Recorder()
        session.num_routers = 2
        open_one(session, 1, recorder, 0.0, 10.0)
        if before == "delta":
            session.receive(TokenDelta(id=1, token_ids=(5,)))
        elif before == "lost":
            session.lost("gone")
            assert len(all_due(session)) == 1
        else:
            session.abort(1)
        session.receive(refusal())
        assert isinstance(recorder.errors[0], UnavailableError)
        assert not session.is_turned_away(1.0)


def test_others_are_not_disturbed():
    session, [recorder] = refused_session(1)
    other = Recorder()
    open_one(session, 7, other, 0.0, 10.0)
    assert not session.is_turned_away(1.0)
    assert not recorder.errors
    assert not session.is_turned_away(1.0 + JUDGED_IN_S)
    assert isinstance(recorder.errors[0], UnavailableError)
    assert not session.must_wait(submit_for(session, ""))
    session.receive(finished(7))
    assert len(other.ends) == 1
    session.check()


@pytest.mark.parametrize("end", ["forget", "abort", "time", "loss", "close"])
def test_a_refused_request_may_end_before_it_is_asked_for_again(end):
    session, [recorder] = refused_session(1)
    if end == "forget":
        assert session.forget(1) is None  # the router knows nothing of it
    elif end == "abort":
        assert session.abort(1) is None
    elif end == "time":
        assert session.expire(10.0) == []
    elif end == "close":
        session.fail_all(BrokenError("closed"))
    else:
        session.lost("gone")
        assert [one.resume for one in all_due(session)] == [None]
        session.receive(finished(1))
    assert recorder.num_ends == (end != "forget")
    assert not session.must_wait(submit_for(session, ""))
    assert not session.is_turned_away(11.0)
    session.check()


# -- with routers ---------------------------------------------------------------------------------


def test_what_one_router_refuses_another_answers():
    async def test(client, routers):
        routers[0].refusal = "unavailable"
        assert (await client.generate("echo a b")).text == "ab"
        assert await read_all(client.stream("echo c d")) == "cd"
        before, after = routers[0].submits[0], routers[1].submits[0]
        assert after.resume is None
        assert (after.key, after.sampling.seed) == (before.key, before.sampling.seed)
        assert len(routers[0].submits) == 1  # it is not asked any more
        routers[1].refusal, routers[0].refusal = "unavailable", ""
        assert (await client.embed("xyz")).vectors[0][0] == 3
        assert client.connection.statistics().num_resumed == 0

    with_routers(2, test)


def test_a_burst_is_refused_and_answered():
    async def test(client, routers):
        routers[0].refusal = "unavailable"
        streams = [client.stream("echo a b") for _ in range(300)]
        assert await asyncio.gather(*map(read_all, streams)) == ["ab"] * 300
        assert len(routers[1].submits) == 300
        assert all(one.resume is None for one in routers[1].submits)

    with_routers(2, test)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_router_is_asked_once(count):
    async def test(client, routers):
        for router in routers:
            router.refusal = "unavailable"
        with pytest.raises(UnavailableError, match="as told"):
            await client.generate("echo a")
        assert [len(router.submits) for router in routers] == [1] * count

    with_routers(count, test)


@pytest.mark.parametrize("code", ["overloaded", "rate_limit_exceeded"])
def test_a_full_line_is_no_reason_to_ask_another(code):
    async def test(client, routers):
        routers[0].refusal = code
        with pytest.raises(OverloadedError):
            await client.generate("echo a")
        assert not routers[1].submits

    with_routers(2, test)


def test_a_stream_goes_on_where_another_request_is_refused():
    async def test(client, routers):
        stream = client.stream("half")
        await stream.read()
        routers[0].refusal = "unavailable"
        with pytest.raises(UnavailableError):
            await client.generate("echo a")
        routers[0].refusal = ""
        assert (await client.generate("echo a")).text == "a"
        assert not routers[1].submits
        stream.drop()

    with_routers(2, test)


def test_other_models_are_answered_while_one_is_refused(monkeypatch):
    monkeypatch.setattr(refusals, "JUDGED_IN_S", 1000.0)

    async def test(client, routers):
        stream = client.stream("half", model="b")
        await stream.read()
        routers[0].refusal, routers[0].refused_model = "unavailable", "a"
        refused = asyncio.create_task(client.generate("echo a", model="a"))
        await until(lambda: len(routers[0].submits) == 2)
        for _ in range(20):
            assert (await client.generate("echo a b", model="b")).text == "ab"
        assert not refused.done()
        assert not routers[1].submits
        stream.drop()  # from now on it serves nobody of this client
        assert (await refused).text == "a"
        assert len(routers[1].submits) == 1

    with_routers(2, test)


def test_what_is_refused_everywhere_is_asked_of_one_router():
    async def test(client, routers):
        routers[0].refusal, routers[0].refuses_for_all = "unavailable", True
        with pytest.raises(UnavailableError, match="as told"):
            await client.generate("echo a")
        assert not routers[1].submits

    with_routers(2, test)


def test_a_router_that_is_not_there_is_no_other():
    async def test(client, routers):
        routers[0].refusal = "unavailable"
        endpoint = routers[0].endpoint
        routers[1].close()
        with pytest.raises(UnavailableError):
            await client.generate("echo a")
        await until(lambda: len(routers[0].submits) == 2)
        assert client.connection.endpoint == endpoint
        routers[1] = FakeRouter()

    with_routers(2, test)
