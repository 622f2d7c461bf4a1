"""A router as its clients' next one: what it names, what it says as it stops, keys of requests."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.router_bench import until
from xllm.protocol.authority import PeerRole
from xllm.protocol.generation import LIFE_ATTEMPTS, RequestFailed, ResumePoint, SubmitRequest
from xllm.protocol.questions import Ping, Pong, RouterAddress
from xllm.protocol.records import RouterRecord
from xllm.protocol.sampling import SamplingParams
from xllm.router.front import Tenant
from xllm.router.peers import Peers
from xllm.router.submission import bound_id

KEY = "0123456789abcdef" * 2


def test_a_ping_is_answered_and_a_stop_is_said(in_bench):
    async def body(b):
        await b.instance("a", tokens_at_once=1)
        client, old = b.client(), b.client()
        client.socket.send(Ping(id=5))
        old.submit(1, 5)
        client.submit(1, 5)
        await until(lambda: 5 in client.heard and client.ids(1) and old.ids(1))
        assert client.heard[5] == [Pong(id=5)]
        stop = asyncio.ensure_future(b.stop())
        await until(lambda: 0 in client.heard)
        assert client.heard[0] == [Pong(id=0, is_stopping=True)]
        late = b.client()
        late.socket.send(Ping(id=1))
        await until(lambda: 1 in late.heard)
        assert late.heard[1][0].is_stopping
        await stop
        assert 0 not in old.heard  # who never pinged may not know the word

    in_bench(body)


@pytest.mark.parametrize(
    ("endpoint", "is_named"),
    [
        ("tcp://10.0.0.2:8011", True),
        ("tcp://[::1]:8011", True),
        ("tcp://node-2:8011", True),
        ("tcp://" + ".".join("0000") + ":8011", False),
        ("tcp://[::]:8011", False),
        ("tcp://*:8011", False),
        ("ipc:///tmp/x", False),
        ("", False),
    ],
)
def test_only_addresses_that_lead_somewhere_are_named(endpoint, is_named):
    peers = Peers()
    record = RouterRecord(name="b", incarnation="1", zmq_endpoint=endpoint, public_key="k")
    peers.publisher_registered(record)
    assert peers.addresses == ((RouterAddress(endpoint, "k"),) if is_named else ())
    peers.publisher_gone(PeerRole.DAEMON, "b")
    assert bool(peers.addresses) == is_named
    peers.publisher_gone(PeerRole.ROUTER, "b")
    assert peers.addresses == ()


def submit(number, key, resume=None):
    sampling = SamplingParams(max_tokens=8, seed=7)
    return SubmitRequest(id=number, prompt="hello", sampling=sampling, key=key, resume=resume)


def test_a_key_is_open_once_and_goes_to_the_highest_attempt(in_bench):
    async def body(b):
        instance = await b.instance("a", tokens_at_once=3)
        first, second, third = b.client(), b.client(), b.client()
        first.socket.send(submit(1, KEY))
        await until(lambda: first.ids(1))
        second.socket.send(submit(1, KEY))
        assert (await second.last(1)).code == "conflict"
        point = ResumePoint(attempt=1, outputs=(tuple(first.ids(1)),), seed=7)
        third.socket.send(submit(1, KEY, point))
        ended = await first.last(1)
        assert isinstance(ended, RequestFailed)
        assert ended.code == "aborted"
        await until(lambda: 1 in third.heard)
        assert [one.attempt for one in instance.admits] == [1, LIFE_ATTEMPTS]
        assert {one.request_id for one in instance.admits} == {bound_id(KEY, Tenant())}
        assert instance.admits[1].outputs == (tuple(first.ids(1)),)
        assert [one.attempt for one in instance.cancels] == [1]
        second.socket.send(submit(2, KEY, point))  # the same attempt again
        assert (await second.last(2)).code == "conflict"
        second.socket.send(submit(3, "short"))
        assert (await second.last(3)).param == "key"

    in_bench(body)


def test_a_key_is_bound_to_its_tenant():
    tenants = [Tenant(), Tenant("a", b"1"), Tenant("b", b"2")]
    assert len({bound_id(KEY, tenant) for tenant in tenants}) == 3
    assert bound_id(KEY, Tenant("x", b"1")) == bound_id(KEY, tenants[1])
