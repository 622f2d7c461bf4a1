"""The ZeroMQ front with a client that reads slowly, or not at all."""

from __future__ import annotations

import asyncio

from tests.router.fake_cluster import FakeCluster, in_loop, text_model
from xllm.errors import BackpressureError, BrokenError
from xllm.protocol.generation import RequestFailed, RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.questions import ListModels, QueryHealth, QueryStatus
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.router import zmq_front
from xllm.router.zmq_front import ZmqFront


class FakeSocket:
    """`num_waiting` messages wait; `full` refuses more."""

    def __init__(self) -> None:
        self.sent: list = []
        self.num_waiting = 0
        self.full = False
        self.gone = False
        self.room = 1 << 30

    def send(self, identity, message) -> None:
        if self.gone:
            raise BrokenError("gone")
        if self.full or self.room == 0:
            raise BackpressureError("full")
        self.room -= 1
        self.sent.append(message)

    def num_queued(self, identity) -> int:
        return self.num_waiting

    def peer(self, identity) -> None:
        """There are no keys."""

    def close(self) -> None:
        """Nothing to close."""


class Front:
    """A front over a fake socket, with some requests of one connection."""

    def __init__(self, num_requests: int) -> None:
        self.cluster = FakeCluster("a")
        self.transport = Transport()
        self.front = ZmqFront(
            self.transport, "inproc://front", self.cluster.service, asyncio.ensure_future
        )
        self.front._socket.close()
        self.socket = FakeSocket()
        self.front._socket = self.socket
        for number in range(num_requests):
            self.submit(number)
        self.said = 0

    def submit(self, number: int) -> None:
        request = SubmitRequest(
            id=number, prompt=(5,), hold_ms=0, sampling=SamplingParams(max_tokens=50)
        )
        self.front._on_message(b"c", request, [])

    def say(self, text: str, reason: str = "") -> None:
        for admit in self.cluster.links.admits():
            self.cluster.say(admit.request_id, self.said, text, reason)
            if reason:
                self.cluster.end(admit.request_id)
        self.said += len(text_model().encode(text))

    def close(self) -> None:
        self.cluster.close()
        self.transport.close()


@in_loop
async def test_a_slow_connection_gets_larger_messages_until_nothing_waits():
    one = Front(2)
    one.say("a")
    one.say("b")
    assert len(one.socket.sent) == 4
    one.socket.num_waiting = zmq_front.SLOW_QUEUE + 1
    one.say("c")
    before = len(one.socket.sent)
    one.say("x")
    one.say("y")
    assert len(one.socket.sent) == before
    one.submit(7)
    assert one.cluster.service.dispatcher.open[one.front._connections[b"c"].open[7]].state.hold_s
    one.socket.num_waiting = 0
    for request in list(one.cluster.service.dispatcher.open.values()):
        one.cluster.service.dispatcher._flush(request)
    assert one.socket.sent[-1].text.endswith("xy")
    before = len(one.socket.sent)
    one.say("d")
    assert len(one.socket.sent) > before
    assert not one.front._connections[b"c"].is_slow
    one.close()


@in_loop
async def test_a_connection_that_does_not_read_loses_its_requests_and_hears_of_it():
    one = Front(3)
    one.socket.full = True
    one.say("a")
    await asyncio.sleep(0)
    assert one.cluster.service.num_open == 0
    assert len(one.cluster.links.cancels()) == 3
    assert one.socket.sent == []
    one.socket.full = False
    async with asyncio.timeout(10):
        while len(one.socket.sent) < 3:
            await asyncio.sleep(0.01)
    assert {type(message) for message in one.socket.sent} == {RequestFailed}
    assert {message.id for message in one.socket.sent} == {0, 1, 2}
    one.submit(0)
    one.said = 0
    admit = one.cluster.links.admits()[-1]
    one.cluster.say(admit.request_id, 0, "a", "length")
    one.cluster.end(admit.request_id)
    assert [type(message) for message in one.socket.sent[3:]] == [TokenDelta, RequestFinished]
    one.close()


@in_loop
async def test_nothing_is_begun_for_a_connection_that_is_cut():
    one = Front(1)
    one.socket.full = True
    one.say("a")  # its delta is dropped: the connection is cut
    admitted = len(one.cluster.links.admits())
    one.submit(7)
    one.submit(8)
    for number in range(10_000):
        one.front._on_message(b"c", ListModels(id=number), [])
        one.front._on_message(b"c", QueryStatus(id=number), [])
        one.front._on_message(b"c", QueryHealth(id=number), [])
    await asyncio.sleep(0)
    connection = one.front._connections[b"c"]
    assert one.cluster.service.num_open == 0
    assert len(one.cluster.links.admits()) == admitted
    assert [(owed.id, owed.code) for owed in connection.owed] == [
        (7, "overloaded"),
        (8, "overloaded"),
        (0, "aborted"),
    ]
    one.socket.full = False
    async with asyncio.timeout(10):
        while connection.is_cut:
            await asyncio.sleep(0.01)
    assert [message.id for message in one.socket.sent] == [7, 8, 0]
    one.front._on_message(b"c", ListModels(id=3), [])
    assert one.socket.sent[-1].id == 3
    one.close()


@in_loop
async def test_what_is_owed_to_a_connection_is_bounded():
    one = Front(1)
    one.socket.full = True
    one.say("a")
    for number in range(100, 100 + 2 * zmq_front.MAX_REFUSALS):
        one.submit(number)
    await asyncio.sleep(0)
    connection = one.front._connections[b"c"]
    assert len(connection.owed) == zmq_front.MAX_REFUSALS + 1
    one.socket.num_waiting = zmq_front.SLOW_QUEUE + 1
    one.socket.room = 5
    one.socket.full = False
    one.front._pay(connection)
    assert len(one.socket.sent) == 5
    assert connection.is_cut  # it took some, and is not done
    one.front._gone(b"c")
    one.front._pay(connection)
    assert len(one.socket.sent) == 5
    one.close()


@in_loop
async def test_the_delta_that_cuts_a_connection_ends_its_request():
    """A request that is submitted just before its first delta finds the queue full."""
    one = Front(0)
    one.submit(1)
    one.socket.full = True
    one.say("a")
    one.socket.full = False  # it reads again at once: the delta is lost all the same
    one.say("b", "length")
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while not one.socket.sent:
            await asyncio.sleep(0.01)
    [end] = one.socket.sent
    assert (type(end), end.id, end.code) == (RequestFailed, 1, "overloaded")
    assert len(end.request_id) == 32
    one.close()


@in_loop
async def test_words_for_a_connection_that_left_are_dropped():
    one = Front(1)
    one.socket.gone = True
    one.say("a")
    one.front._gone(b"c")
    assert one.cluster.service.num_open == 0
    assert one.front.num_connections == 0
    one.front._gone(b"c")
    one.close()
