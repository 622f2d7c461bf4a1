"""Sockets on the loop: order, bounds, who left, and what is no message."""

import asyncio
import os
import pathlib
import socket as sockets
import time

import msgspec
import pytest
import uvloop
import zmq

from xllm.errors import (
    BackpressureError,
    BrokenError,
    ClosedError,
    ConfigError,
    InvariantError,
    ListenError,
)
from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.client import AbortRequest, BadMessage, ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.limits import SocketLimits
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import CLIENT_DOMAIN, Security, create_keys

BOTH = Decoder(ClientMessage | RouterMessage)


def run(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 20))


async def until(condition, timeout=5.0):
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture(params=["ipc", "tcp", "inproc"])
def endpoint(request, tmp_path):
    return {
        "ipc": f"ipc://{tmp_path}/s",
        "tcp": "tcp://127.0.0.1:0",
        "inproc": "inproc://test-socket",
    }[request.param]


def echo_pair(transport, endpoint, **options):
    """A router that echoes, and a dealer that collects."""
    got = []
    router = RouterSocket(
        transport,
        endpoint,
        BOTH,
        lambda identity, message, frames: router.send(identity, message, frames),
        bad_reply=lambda text: BadMessage(message=text),
        **options,
    )
    dealer = DealerSocket(
        transport, router.endpoint, BOTH, lambda message, frames: got.append((message, frames))
    )
    return router, dealer, got


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


def test_router_is_told_who_left_after_their_last_words(tmp_path):
    async def main():
        transport, other = Transport(), Transport()
        events = []
        router = RouterSocket(
            transport,
            f"ipc://{tmp_path}/s",
            BOTH,
            lambda identity, message, frames: events.append((identity, message.id)),
            on_gone=lambda identity: events.append((identity, "gone")),
        )
        for round_number in range(20):
            dealer = DealerSocket(other, router.endpoint, BOTH, lambda message, frames: None)
            mute = DealerSocket(other, router.endpoint, BOTH, lambda message, frames: None)
            dealer.send(AbortRequest(id=round_number))
            await until(lambda: dealer.connected and mute.connected and events)
            await until(lambda: events[-1][1] != "gone")
            mute.close()
            dealer.close()
            await until(lambda: events[-1][1] == "gone")
            assert [what for _, what in events] == [round_number, "gone"]
            assert events[0][0] == events[1][0]
            assert not router.peers
            events.clear()
        router.close()
        other.close()
        transport.close()

    run(main())


def test_dealer_reconnects_and_tells(tmp_path):
    async def main():
        transport, server = Transport(), Transport()
        events = []
        path = f"ipc://{tmp_path}/s"
        dealer = DealerSocket(
            transport,
            path,
            BOTH,
            lambda message, frames: events.append(message.id),
            on_connected=lambda: events.append("up"),
            on_gone=lambda: events.append("gone"),
        )
        dealer.send(AbortRequest(id=1))  # waits: nobody listens yet
        for _ in range(2):
            router = RouterSocket(server, path, BOTH, lambda i, m, f: router.send(i, m, f))
            await until(lambda: events[-1:] == [1])
            router.close()
            await until(lambda: events[-1:] == ["gone"])
            dealer.send(AbortRequest(id=1))
        assert events == ["up", 1, "gone"] * 2
        assert dealer.discard_queued() == 1
        dealer.close()
        server.close()
        transport.close()

    run(main())


def test_a_dealer_that_slept_through_a_reconnection_is_told_in_order(tmp_path):
    """As a process that was stopped: both events wait for it when it goes on."""

    async def main():
        transport = Transport()
        where = f"ipc://{tmp_path}/s"
        told = []

        def bind():
            return RouterSocket(transport, where, BOTH, lambda identity, message, frames: None)

        router = bind()
        dealer = DealerSocket(
            transport,
            where,
            BOTH,
            lambda message, frames: None,
            on_gone=lambda: told.append("gone"),
            on_connected=lambda: told.append("connected"),
        )
        await until(lambda: told == ["connected"])
        router.close()
        router = bind()
        time.sleep(1.0)  # noqa: ASYNC251  # the loop stands still; ZeroMQ's thread does not
        await until(lambda: len(told) == 3)
        assert told == ["connected", "gone", "connected"]
        assert dealer.connected
        dealer.close()
        router.close()
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


def test_publisher_to_subscribers(endpoint):
    async def main():
        transport = Transport()
        publisher = PublisherSocket(transport, endpoint)
        got = []
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.append((topic, message.seq))
        )
        subscriber.connect(publisher.endpoint)
        number = 0
        async with asyncio.timeout(5):
            while not got:  # a late subscriber misses the first ones
                number += 1
                publisher.publish(b"presence", RouterPresence("r", "i", number))
                await asyncio.sleep(0.005)
        first = got[0][1]
        for number in range(number + 1, number + 100):
            publisher.publish(b"presence", RouterPresence("r", "i", number))
        await until(lambda: got[-1] == (b"presence", number))
        assert [seq for _, seq in got] == list(range(first, number + 1))
        subscriber.disconnect(publisher.endpoint)
        subscriber.disconnect("tcp://127.0.0.1:1")
        subscriber.close()
        publisher.close()
        transport.close()

    run(main())


def test_an_address_that_cannot_be_leaves_the_other_publishers_heard(tmp_path):
    async def main():
        transport = Transport()
        publisher = PublisherSocket(transport, f"ipc://{tmp_path}/p")
        late = PublisherSocket(transport, f"ipc://{tmp_path}/late")
        got = set()
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.add(message.publisher)
        )
        subscriber.connect(publisher.endpoint)
        for bad in ("tcp://192.0.2.1:9", "http://x", "tcp://127.0.0.1:x"):
            with pytest.raises((BrokenError, ConfigError)):
                subscriber.connect(bad)
        with pytest.raises(BrokenError):
            subscriber.connect("tcp://192.0.2.1:9", "k" * 40)
        subscriber.connect(late.endpoint)
        async with asyncio.timeout(5):
            while got != {"p", "late"}:
                publisher.publish(b"presence", RouterPresence("p", "i", 1))
                late.publish(b"presence", RouterPresence("late", "i", 1))
                await asyncio.sleep(0.005)
        for thing in (subscriber, publisher, late, transport):
            thing.close()

    run(main())


def test_one_subscriber_hears_publishers_with_and_without_keys(tmp_path):
    async def main():
        key = create_keys(str(tmp_path / "k"))
        transport = Transport(Security.load(str(tmp_path / "k")))
        far = PublisherSocket(transport, "tcp://127.0.0.1:0")
        near = PublisherSocket(transport, f"ipc://{tmp_path}/p")
        got = set()
        subscriber = SubscriberSocket(
            transport, Decoder(BusMessage), lambda topic, message: got.add(message.publisher)
        )
        subscriber.connect(far.endpoint, key)
        subscriber.connect(near.endpoint)
        async with asyncio.timeout(5):
            while got != {"far", "near"}:
                far.publish(b"presence", RouterPresence("far", "i", 1))
                near.publish(b"presence", RouterPresence("near", "i", 1))
                await asyncio.sleep(0.005)
        for thing in (subscriber, near, far, transport):
            thing.close()

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


def test_ipv6_loopback_can_be_bound():
    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, "tcp://[::1]:0")
        dealer.send(AbortRequest(id=1))
        await until(lambda: got)
        for thing in (dealer, router, transport):
            thing.close()

    if not sockets.has_ipv6:
        pytest.skip("no IPv6 here")
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


def test_an_ipc_path_cannot_be_stolen_and_a_stale_one_is_taken_over(tmp_path):
    async def main():
        transport = Transport()
        path = f"ipc://{tmp_path}/s"
        (tmp_path / "s").touch()  # what a killed process left
        (tmp_path / "s.lock").touch()
        router = RouterSocket(transport, path, BOTH, lambda i, m, f: None)
        with pytest.raises(ListenError, match="in use"):
            RouterSocket(transport, path, BOTH, lambda i, m, f: None)
        router.close()
        assert os.listdir(tmp_path) == []
        transport.close()

    run(main())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.1:0"])
def test_other_machines_need_keys(address):
    async def main():
        transport = Transport()
        with pytest.raises(ConfigError, match="keys"):
            RouterSocket(transport, address, BOTH, lambda i, m, f: None)
        with pytest.raises(BrokenError, match="key"):
            DealerSocket(transport, "tcp://192.0.2.1:9", BOTH, lambda m, f: None)
        with pytest.raises(ConfigError, match="characters"):
            RouterSocket(transport, "ipc:///tmp/" + "x" * 120, BOTH, lambda i, m, f: None)
        transport.close()
        with pytest.raises(ClosedError):
            PublisherSocket(transport, "inproc://x")

    run(main())


def connections_of(port):
    """Copies of this process's TCP connections from or to a port of its own."""
    directory = pathlib.Path("/proc/self/fd")
    names = [one.name for one in directory.iterdir() if one.is_socket()]
    found = []
    for name in names:
        one = sockets.socket(fileno=os.dup(int(name)))
        try:
            ends = (one.getsockname(), one.getpeername())
        except OSError:
            ends = ()  # it listens, or is not connected
        if one.family == sockets.AF_INET and port in [end[1] for end in ends]:
            found.append(one)
        else:
            one.close()
    return found


def test_a_peer_whose_machine_vanished_is_noticed_by_the_kernel():
    """Nobody can pull a cable here: what the kernel was told about both ends, then."""

    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, "tcp://127.0.0.1:0")
        dealer.send(AbortRequest(id=1))
        await until(lambda: got)
        ends = connections_of(int(router.endpoint.rpartition(":")[2]))
        assert len(ends) == 2
        for one in ends:
            with one:
                assert one.getsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE)
                idle = one.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPIDLE)
                pause = one.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPINTVL)
                count = one.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPCNT)
                assert 0 < idle + pause * count <= 15
                timeout_ms = one.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT)
                assert 0 < timeout_ms <= 10_000
        dealer.close()
        router.close()
        transport.close()

    run(main())


def test_a_taken_port_is_one_clear_error():
    async def main():
        transport = Transport()
        with sockets.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ListenError, match="cannot listen") as caught:
                PublisherSocket(transport, f"tcp://127.0.0.1:{port}")
            assert caught.value.exit_code == 71
            with pytest.raises(ListenError, match="cannot listen"):
                PublisherSocket(transport, "ipc:///nowhere/at/all")
        transport.close()

    run(main())


def test_keys_admit_the_listed_and_nobody_else(tmp_path):
    async def main():
        server_key = create_keys(str(tmp_path / "server"))
        client_key_dir = tmp_path / "client"
        create_keys(str(client_key_dir))
        create_keys(str(tmp_path / "stranger"))
        allowed = tmp_path / "server" / "allowed"
        (allowed / "client.key").write_bytes((client_key_dir / "node.key").read_bytes())
        server = Transport(Security.load(str(tmp_path / "server")))
        client = Transport(Security.load(str(client_key_dir)))
        stranger = Transport(Security.load(str(tmp_path / "stranger")))
        keyless = Transport()
        seen = []
        router = RouterSocket(
            server, "tcp://127.0.0.1:0", BOTH, lambda i, message, f: seen.append(message.id)
        )
        refused = []
        good = DealerSocket(client, router.endpoint, BOTH, lambda m, f: None, server_key=server_key)
        bad = DealerSocket(
            stranger,
            router.endpoint,
            BOTH,
            lambda m, f: None,
            server_key=server_key,
            on_refused=lambda: refused.append(1),
        )
        plain = DealerSocket(keyless, router.endpoint, BOTH, lambda m, f: None)
        bad.send(AbortRequest(id=2))
        plain.send(AbortRequest(id=3))
        await until(lambda: refused)
        good.send(AbortRequest(id=1))
        await until(lambda: seen)
        assert seen == [1]
        with pytest.raises(BrokenError, match="keys"):
            DealerSocket(keyless, router.endpoint, BOTH, lambda m, f: None, server_key=server_key)
        for thing in (good, bad, plain, router, keyless, stranger, client, server):
            thing.close()

    run(main())


def test_a_clients_key_opens_the_client_front_only(tmp_path):
    async def main():
        server_key = create_keys(str(tmp_path / "server"))
        create_keys(str(tmp_path / "client"))
        clients = tmp_path / "server" / "clients"
        clients.mkdir()
        (clients / "c.key").write_bytes((tmp_path / "client" / "node.key").read_bytes())
        server = Transport(Security.load(str(tmp_path / "server")))
        client = Transport(Security.load(str(tmp_path / "client")))
        seen, refused = [], []

        def listen(name, domain):
            return RouterSocket(
                server,
                "tcp://127.0.0.1:0",
                BOTH,
                lambda i, message, f: seen.append((name, message.id)),
                **domain,
            )

        def join(transport, router, **more):
            return DealerSocket(
                transport, router.endpoint, BOTH, lambda m, f: None, server_key=server_key, **more
            )

        front = listen("front", {"domain": CLIENT_DOMAIN})
        inner = listen("inner", {})
        things = [
            join(client, front),
            join(client, inner, on_refused=lambda: refused.append(1)),
            join(server, front),
            join(server, inner),
        ]
        for number, one in enumerate(things):
            one.send(AbortRequest(id=number))
        await until(lambda: refused and len(seen) == 3)
        assert sorted(seen) == [("front", 0), ("front", 2), ("inner", 3)]
        for thing in (*things, front, inner, client, server):
            thing.close()

    run(main())


def test_no_public_key_looks_like_a_flag(tmp_path, monkeypatch):
    draw = zmq.curve_keypair
    odd = iter([(b"-" + b"k" * 39, b"s" * 40)] * 3)
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(odd, None) or draw())
    key = create_keys(str(tmp_path / "k"))
    assert next(odd, None) is None
    assert not key.startswith("-")
    assert Security.load(str(tmp_path / "k")).public_key == key


def test_a_file_without_a_key_is_named(tmp_path):
    create_keys(str(tmp_path / "k"))
    (tmp_path / "k" / "allowed" / "bad.key").write_text("nothing")
    with pytest.raises(ConfigError, match=r"bad\.key"):
        Transport(Security.load(str(tmp_path / "k")))


def test_a_key_that_others_can_read_is_refused(tmp_path):
    create_keys(str(tmp_path / "k"))
    assert os.stat(tmp_path / "k" / "node.key_secret").st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="holds keys"):
        create_keys(str(tmp_path / "k"))
    os.chmod(tmp_path / "k" / "node.key_secret", 0o644)
    with pytest.raises(ConfigError, match="0600"):
        Security.load(str(tmp_path / "k"))
    with pytest.raises(ConfigError, match="no usable key"):
        Security.load(str(tmp_path / "absent"))
