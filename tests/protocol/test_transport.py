"""Sockets on the loop: order, bounds, and what is no message."""

import asyncio

import msgspec
import pytest
import zmq

from tests.protocol.socket_pairs import BOTH, echo_pair, run, until
from xllm.errors import BackpressureError, BrokenError, InvariantError
from xllm.protocol.client import BadMessage
from xllm.protocol.codec import encode
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.router import RouterSocket


def test_echo_keeps_order_and_frames(endpoint):
    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, endpoint)
        for number in range(3000):
            dealer.send(AbortRequest(id=number), (b"x" * 10, bytes([number % 256])))
        await until(lambda: len(got) == 3000)
        assert [m.id for m, _ in got] == list(range(3000))
        assert got[7][1] == [b"x" * 10, b"\x07"]
        assert router.statistics().num_received == 3000
        dealer.close()
        router.close()
        dealer.close()
        transport.close()

    run(main())


def test_nonsense_is_counted_and_answered_and_harms_nobody(tmp_path):
    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, f"ipc://{tmp_path}/s")
        raw = zmq.Context()
        stranger = raw.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.connect(router.endpoint)
        bad = [
            [b""],
            [b"\xc1"],
            [b"\x80"],
            [b"\x81\xa4type\xa6system"],
            [msgspec.msgpack.encode({"type": "os.system", "id": 1})],
            [msgspec.msgpack.encode({"type": "abort", "id": "x"})],
            [b"\x91" * 5000],
            [encode(AbortRequest(id=3))] + [b"frame"] * 40,
        ]
        for frames in bad:
            stranger.send_multipart(frames)
        dealer.send(AbortRequest(id=9))
        await until(lambda: got and router.statistics().num_bad == len(bad))
        answers = []
        async with asyncio.timeout(5):
            while len(answers) < len(bad):
                if stranger.poll(1):
                    answers.append(msgspec.msgpack.decode(stranger.recv_multipart()[0]))
                await asyncio.sleep(0)
        assert {a["type"] for a in answers} == {"bad_message"}
        assert got[0][0].id == 9
        stranger.close()
        raw.term()
        dealer.close()
        router.close()
        transport.close()

    run(main())


def test_nonsense_from_a_peer_that_does_not_read_is_no_handlers_fault(tmp_path):
    async def main():
        transport = Transport()
        limits = SocketLimits(high_water_mark=1, max_queued_messages=1)
        router = RouterSocket(
            transport,
            f"ipc://{tmp_path}/s",
            BOTH,
            lambda identity, message, frames: None,
            bad_reply=lambda text: BadMessage(message="x" * 30_000),
            limits=limits,
        )
        raw = zmq.Context()
        stuck = raw.socket(zmq.DEALER)
        stuck.linger = 0
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.setsockopt(zmq.RCVBUF, 4096)
        stuck.connect(router.endpoint)
        for number in range(300):
            stuck.send(b"\xc1")
            await until(lambda number=number: router.statistics().num_bad > number)
        assert router.statistics().num_queued == 1
        assert transport.num_handler_errors == 0
        stuck.close()
        raw.term()
        router.close()
        transport.close()

    run(main())


def test_peer_that_does_not_read_is_bounded_and_others_go_on(tmp_path):
    async def main():
        transport = Transport()
        limits = SocketLimits(high_water_mark=10, max_queued_messages=100)
        identities = []
        router = RouterSocket(
            transport,
            f"ipc://{tmp_path}/s",
            BOTH,
            lambda identity, message, frames: identities.append(identity),
            limits=limits,
        )
        raw = zmq.Context()
        stuck = raw.socket(zmq.DEALER)
        stuck.linger = 0
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.setsockopt(zmq.RCVBUF, 4096)
        stuck.connect(router.endpoint)
        stuck.send(encode(AbortRequest(id=0)))
        got = []
        reader = DealerSocket(
            transport, router.endpoint, BOTH, lambda message, frames: got.append(message.id)
        )
        await until(lambda: len(identities) == 1)
        reader.send(AbortRequest(id=0))
        await until(lambda: len(identities) == 2)
        body = AbortRequest(id=1)
        with pytest.raises(BackpressureError):
            for _ in range(100_000):
                router.send(identities[0], body, (b"x" * 10_000,))
        for number in range(300):
            router.send(identities[1], AbortRequest(id=number))
            await until(lambda: len(got) > number - 50)
        await until(lambda: len(got) == 300)
        assert got == list(range(300))
        assert router.statistics().num_queued <= 100
        stuck.close()
        raw.term()
        await until(lambda: identities[0] not in router.peers)
        with pytest.raises(BrokenError):
            router.send(identities[0], body)
        reader.close()
        router.close()
        transport.close()

    run(main())


def test_peers_that_do_not_read_are_not_tried_at_every_look(tmp_path, monkeypatch):
    async def main():
        transport = Transport()
        router, dealer, _got = echo_pair(transport, f"ipc://{tmp_path}/s")
        tries = []
        monkeypatch.setattr(router, "_try_send", lambda parts: tries.append(1) or False)
        router._outboxes.put(b"stuck", (b"stuck", b"x"))
        begin = asyncio.get_running_loop().time()
        for _ in range(2000):
            router._look()
        passed = asyncio.get_running_loop().time() - begin
        assert 1 <= len(tries) <= 2 + passed / 0.001
        for thing in (dealer, router, transport):
            thing.close()

    run(main())


def test_a_handler_that_raises_loses_its_message_only(tmp_path):
    async def main():
        transport = Transport()
        fatal = []
        transport.on_fatal = fatal.append
        seen = []

        def handle(identity, message, frames):
            if message.id == 1:
                raise ValueError("secret prompt")
            if message.id == 2:
                raise InvariantError("broken")
            seen.append(message.id)

        router = RouterSocket(transport, f"ipc://{tmp_path}/s", BOTH, handle)
        dealer = DealerSocket(transport, router.endpoint, BOTH, lambda message, frames: None)
        for number in range(5):
            dealer.send(AbortRequest(id=number))
        await until(lambda: len(seen) == 3)
        assert seen == [0, 3, 4]
        assert transport.num_handler_errors == 2
        assert [type(e) for e in fatal] == [InvariantError]
        dealer.close()
        router.close()
        transport.close()

    run(main())
