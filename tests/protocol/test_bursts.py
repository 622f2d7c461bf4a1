"""What a socket sends in one turn of the loop: order for each peer, whatever the socket takes."""

import asyncio
import contextlib
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.socket_pairs import BOTH, echo_pair, run, until
from xllm.errors import BackpressureError, BrokenError
from xllm.protocol.client import BadMessage
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.outbox import Outboxes
from xllm.protocol.transport.router import RouterSocket

PEERS = (b"a", b"b", b"c")
BURST = 8
"""Of the channel's: a queue is over its bound by so many messages at most."""
LIMITS = SocketLimits(max_queued_messages=4, max_queued_bytes=40_000)

words = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(PEERS), st.sampled_from((1, 30_000))),
    st.tuples(st.just("turn"), st.none(), st.none()),
    st.tuples(st.just("flush"), st.none(), st.none()),
    st.tuples(st.sampled_from(("full", "reads", "gone")), st.sampled_from(PEERS), st.none()),
)


class Wire:
    """Stands for the socket: takes what peers read."""

    def __init__(self):
        self.took = []
        self.full = set()
        self.gone = set()

    def __call__(self, parts):
        peer, number = parts[0], int(parts[1])
        if peer in self.gone:
            raise BrokenError("gone")
        if peer in self.full:
            return False
        self.took.append((peer, number))
        return True


@contextlib.asynccontextmanager
async def resting_pair(endpoint):
    """A dealer whose next message is the first of its turn, its router's echoes, the transport."""
    transport = Transport()
    router, dealer, got = echo_pair(transport, endpoint)
    try:
        await until(lambda: dealer.connected and not dealer._look_scheduled)
        yield dealer, got, transport
    finally:
        for thing in (dealer, router, transport):
            thing.close()


async def play(channel, wire, script):
    """Returns what the channel accepted."""
    accepted = []
    for number, (word, peer, size) in enumerate(script):
        if word == "send":
            try:
                channel._send(peer, (peer, b"%d" % number, b"x" * size))
                accepted.append((peer, number))
            except BackpressureError:
                assert channel._outboxes.count(peer) >= 1
            except BrokenError:
                assert peer in wire.gone
        elif word == "turn":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        elif word == "flush":
            channel.flush()
            assert not channel._burst
        elif word == "full":
            wire.full.add(peer)
        elif word == "reads":
            wire.full.discard(peer)
        else:
            wire.gone.add(peer)
        assert len(channel._burst) < BURST
        for one in PEERS:
            assert channel._outboxes.count(one) <= LIMITS.max_queued_messages + BURST
    return accepted


@settings(max_examples=60, deadline=None)
@given(st.lists(words, max_size=120))
def test_every_message_that_was_taken_leaves_once_and_in_order(script):
    async def main():
        transport = Transport()
        channel = RouterSocket(
            transport, "inproc://bursts", BOTH, lambda *args: None, limits=LIMITS
        )
        wire = channel._try_send = Wire()
        await asyncio.sleep(0)
        accepted = await play(channel, wire, script)
        wire.full.clear()
        await until(lambda: not channel.statistics().num_queued)
        for peer in PEERS:
            sent = [number for name, number in wire.took if name == peer]
            asked = [number for name, number in accepted if name == peer]
            assert all(first < second for first, second in pairwise(sent))
            assert sent == asked or (peer in wire.gone and sent == asked[: len(sent)])
        channel.close()
        transport.close()

    run(main())


def test_the_first_of_a_turn_leaves_at_once_and_the_rest_together():
    async def main():
        async with resting_pair("inproc://turn") as (dealer, got, _):
            for number in range(BURST):
                dealer.send(AbortRequest(id=number))
            assert dealer.statistics().num_sent == 1
            assert dealer.statistics().num_queued == BURST - 1
            dealer.send(AbortRequest(id=BURST))  # so many do not wait for the end of the turn
            assert dealer.statistics().num_sent == BURST + 1
            await until(lambda: len(got) == BURST + 1)
            assert [one[0].id for one in got] == list(range(BURST + 1))

    run(main())


def test_a_large_message_waits_for_nobody_and_passes_nobody():
    async def main():
        async with resting_pair("inproc://large") as (dealer, _, _):
            for number in range(3):
                dealer.send(AbortRequest(id=number))
            dealer.send(AbortRequest(id=3), (b"x" * 20_000,))
            assert dealer.statistics().num_sent == 4

    run(main())


def test_what_was_not_sent_when_the_connection_ended_is_forgotten(tmp_path):
    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, f"ipc://{tmp_path}/s")
        dealer.send(AbortRequest(id=1))
        await until(lambda: got)
        for number in range(5):
            dealer.send(AbortRequest(id=10 + number))
        assert dealer.discard_queued() == 4
        await until(lambda: len(got) == 2)
        assert dealer.statistics().num_queued == 0
        identity = next(iter(router.peers))
        for number in range(5):
            router.send(identity, AbortRequest(id=20 + number))
        router._forget(identity)
        assert router.statistics().num_queued == 0
        await until(lambda: len(got) == 3)
        assert got[-1][0].id == 20
        for thing in (dealer, router, transport):
            thing.close()

    run(main())


def test_words_said_before_a_close_leave(tmp_path):
    async def main():
        transport, other = Transport(), Transport()
        seen = []
        router = RouterSocket(
            transport, f"ipc://{tmp_path}/s", BOTH, lambda peer, message, _: seen.append(message.id)
        )
        dealer = DealerSocket(other, router.endpoint, BOTH, lambda message, frames: None)
        await until(lambda: dealer.connected)
        sent = []
        dealer._try_send = lambda parts: sent.append(parts) or True
        for number in range(5):
            dealer.send(AbortRequest(id=number))
        dealer.close()
        assert len(sent) == 5
        for thing in (router, transport, other):
            thing.close()

    run(main())


def test_a_queue_has_bounds_of_messages_and_bytes():
    boxes = Outboxes("it", SocketLimits(max_queued_messages=2, max_queued_bytes=10))
    with pytest.raises(BackpressureError):
        boxes.put(b"a", (b"a", b"x" * 10))
    assert b"a" not in boxes.peers
    boxes.put(b"a", (b"a", b"1"))
    boxes.put(b"a", (b"a", b"2"))
    with pytest.raises(BackpressureError):
        boxes.put(b"a", (b"a", b"3"))
    boxes.put(b"a", (b"a", b"4"), anyway=True)
    assert (boxes.count(b"a"), boxes.totals()) == (3, (3, 6))
    assert boxes.drop(b"a") == 3
    assert boxes.totals() == (0, 0)


def test_a_send_that_fails_leaves_nothing_unread(tmp_path):
    """A send reads what came meanwhile into ZeroMQ, without a word of the descriptor."""

    async def main():
        transport, other = Transport(), Transport()
        seen = []
        router = RouterSocket(
            transport, f"ipc://{tmp_path}/s", BOTH, lambda peer, message, _: seen.append(message.id)
        )
        dealer = DealerSocket(other, router.endpoint, BOTH, lambda message, frames: None)
        await until(lambda: dealer.connected)
        for number in range(20):
            await until(lambda: not router._look_scheduled)
            dealer.send(AbortRequest(id=number))
            time.sleep(0.02)  # noqa: ASYNC251  # its bytes come while the loop does something else
            with pytest.raises(BrokenError):
                router.send(b"nobody", AbortRequest(id=0))
            await until(lambda number=number: number in seen)
        for thing in (dealer, router, transport, other):
            thing.close()

    run(main())


def test_a_large_body_before_a_small_frame_leaves_at_once():
    async def main():
        async with resting_pair("inproc://body") as (dealer, _, _):
            for number in range(2):
                dealer.send(BadMessage(message="x" * 20_000 * number), (b"x",))
            assert dealer.statistics().num_sent == 2

    run(main())


def test_flush_sends_what_waits_for_the_end_of_the_turn():
    async def main():
        async with resting_pair("inproc://flush") as (dealer, got, _):
            for number in range(3):
                dealer.send(AbortRequest(id=number))
            dealer.flush()
            assert dealer.statistics().num_sent == 3
            dealer.flush()
            await until(lambda: len(got) == 3)

    run(main())


def test_a_message_that_cannot_be_sent_costs_no_other(tmp_path):
    async def main():
        async with resting_pair(f"ipc://{tmp_path}/s") as (dealer, got, transport):
            dealer.send(AbortRequest(id=0))
            dealer._send(b"", ("no bytes",))
            dealer.send(AbortRequest(id=1))
            await until(lambda: len(got) == 2)
            assert [message.id for message, _ in got] == [0, 1]
            assert transport.num_handler_errors == 1

    run(main())
