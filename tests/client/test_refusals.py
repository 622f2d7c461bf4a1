"""Routers without an instance: who is refused by one asks the next, and nobody else does."""

from __future__ import annotations

import asyncio

import pytest

from tests.client.fake_router import FakeRouter
from tests.client.test_async_client import until
from tests.client.test_failover import read_all, with_routers
from tests.client.test_session import Recorder, finished, open_one
from xllm.client.refusals import JUDGED_IN_S, Refusals, Worth, is_worth_another
from xllm.client.retries import MAX_LOSSES, RETRY_BURST
from xllm.client.session import ClientSession
from xllm.errors import BrokenError, OverloadedError, UnavailableError
from xllm.protocol.client import ListModels, RequestFailed, SubmitRequest, TokenDelta


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


def test_a_router_that_serves_others_is_kept():
    refusals = Refusals()
    assert refusals.judge(0.0, serves_others=True) is Worth.OPEN
    refusals.add(1, UnavailableError("none"))
    assert refusals.judge(1.0, serves_others=True) is Worth.OPEN
    assert refusals.judge(1.0, serves_others=False) is Worth.LEAVE
    assert refusals.judge(1.0 + JUDGED_IN_S, serves_others=True) is Worth.KEEP
    assert list(refusals.take()) == [1]
    assert refusals.judge(2.0, serves_others=True) is Worth.OPEN
    refusals.add(2, UnavailableError("none"))
    assert refusals.judge(2.0, serves_others=True) is Worth.OPEN  # its time begins anew


def refused_session(
    num_requests: int, num_routers: int = 2
) -> tuple[ClientSession, list[Recorder]]:
    session = ClientSession()
    session.num_routers = num_routers
    recorders = [Recorder() for _ in range(num_requests)]
    for recorder in recorders:
        key = session.next_id()
        open_one(session, key, recorder, 0.0, 10.0)
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
    assert session.has_due
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
    assert not session.has_due
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
    assert not session.has_due
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
