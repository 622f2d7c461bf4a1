"""Sockets that demand keys: who is heard, who is cut when a key is revoked, who is too many."""

from __future__ import annotations

import asyncio
import os
import socket as sockets
import subprocess
import sys
import time

import pytest
import zmq

from tests.security.keyed_peers import Nodes, pair_of, raw_curve, run, until, with_nodes
from xllm.cli.keys import allow_peer
from xllm.errors import BackpressureError, ConfigError, ListenError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.client import AbortRequest, ClientMessage, ListModels, RouterMessage
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import AssignRole, InstanceReply, InstanceRequest, ProbeInstance
from xllm.protocol.transport.allow_list import CLIENT_DOMAIN, CLUSTER_DOMAIN
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.limits import SocketLimits, connection_limit
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import Security

BOTH = Decoder(ClientMessage | RouterMessage)
ASKS: Decoder = Decoder(InstanceRequest)
ANSWERS: Decoder = Decoder(InstanceReply)
ANYWHERE = "tcp://127.0.0.1:0"


def hearing(nodes, transport, **more):
    """A router of instance requests that notes (peer's name, message), and who left."""
    heard, gone = [], []
    router = nodes.keep(
        RouterSocket(
            transport,
            ANYWHERE,
            ASKS,
            lambda identity, message, frames: heard.append((router.peer(identity).name, message)),
            on_gone=gone.append,
            **more,
        )
    )
    return router, heard, gone


def test_strangers_deliver_nothing(tmp_path):
    """No key, the wrong server's key, a key that is not listed, a revoked one: none is heard."""

    async def main(nodes):
        for name in ("good", "revoked"):
            nodes.admit(name)
        stranger, gone = zmq.curve_keypair(), pair_of(tmp_path / "revoked")
        nodes.revoke("revoked")
        router, heard, _ = hearing(nodes, nodes.server())
        wrong_server = zmq.curve_keypair()[0].decode()
        keyless = zmq.Context().socket(zmq.DEALER)
        keyless.linger = 0
        bad = [
            keyless,
            raw_curve(zmq.DEALER, wrong_server, *pair_of(tmp_path / "good")),
            raw_curve(zmq.DEALER, nodes.server_key, *stranger),
            raw_curve(zmq.DEALER, nodes.server_key, *gone),
        ]
        word = encode(ProbeInstance(1))
        for one in bad:
            one.connect(router.endpoint)
            for _ in range(50):
                one.send(word)
        good = nodes.dealer("good", router.endpoint, ANSWERS)
        for number in range(3):
            good.send(ProbeInstance(number + 2))
            await until(lambda number=number: len(heard) == number + 1)
            await asyncio.sleep(0.1)  # they try again and again meanwhile
        assert {name for name, _ in heard} == {"good"}
        assert [message.nonce for _, message in heard] == [2, 3, 4]
        assert router.statistics().num_received == 3
        for one in bad:
            one.context.destroy(linger=0)

    with_nodes(tmp_path, main)


def test_a_dead_authenticator_closes_and_is_started_again(tmp_path):
    async def main(nodes):
        nodes.admit("early")
        nodes.admit("late")
        transport = nodes.keep(Transport(Security.load(nodes.server_dir)))
        router, heard, _ = hearing(nodes, transport)
        early = nodes.dealer("early", router.endpoint, ANSWERS)
        early.send(ProbeInstance(1))
        await until(lambda: heard)
        thread = transport._authenticator._thread
        thread.pipe.send(b"TERMINATE")
        await until(lambda: not thread.is_alive())
        late = nodes.dealer("late", router.endpoint, ANSWERS)
        late.send(ProbeInstance(2))
        early.send(ProbeInstance(3))
        await until(lambda: len(heard) == 2)
        await asyncio.sleep(0.3)
        assert [message.nonce for _, message in heard] == [1, 3]
        assert not late.connected
        transport.refresh_keys()
        await until(lambda: len(heard) == 3)
        assert heard[2] == ("late", ProbeInstance(2))

    with_nodes(tmp_path, main)


def test_a_revoked_peer_is_cut_and_others_are_not(tmp_path):
    async def main(nodes):
        for name in ("good", "bad", "mute"):
            nodes.admit(name)
        transport = nodes.server()
        router, heard, gone = hearing(nodes, transport)
        good = nodes.dealer("good", router.endpoint, ANSWERS)
        bad = [nodes.dealer("bad", router.endpoint, ANSWERS) for _ in range(3)]
        mute = nodes.dealer("mute", router.endpoint, ANSWERS)
        for one in (good, *bad):
            one.send(ProbeInstance(1))
        await until(lambda: len(heard) == 4 and mute.connected)
        began = time.monotonic()
        nodes.revoke("bad")
        nodes.revoke("mute")
        await until(lambda: len(gone) == 3)
        print(f"cut after {time.monotonic() - began:.3f} s")
        await until(lambda: not any(one.connected for one in bad))
        assert transport.num_cut == 3
        mute.send(ProbeInstance(2))  # its connection had said nothing, so nobody knew whose it was
        await until(lambda: not mute.connected)
        for number in range(20):
            good.send(ProbeInstance(number))
            for one in (*bad, mute):
                one.send(ProbeInstance(100))
            await until(lambda number=number: len(heard) == 5 + number)
        assert good.connected
        assert {name for name, _ in heard[4:]} == {"good"}
        nodes.admit("bad")
        await until(lambda: len(heard) > 24)
        assert heard[-1][0] == "bad"

    with_nodes(tmp_path, main)


def test_a_revoked_subscriber_hears_nothing_more(tmp_path):
    async def main(nodes):
        for name in ("good", "bad"):
            nodes.admit(name, "router")
        transport = nodes.server()
        publisher = nodes.keep(PublisherSocket(transport, ANYWHERE))
        heard = {name: [] for name in ("good", "bad")}
        for name, words in heard.items():
            subscriber = nodes.keep(
                SubscriberSocket(
                    nodes.transport(name),
                    Decoder(BusMessage),
                    lambda topic, message, words=words: words.append(message.seq),
                )
            )
            subscriber.connect(publisher.endpoint, nodes.server_key)
        number = 0

        async def publish_until(condition):
            nonlocal number
            async with asyncio.timeout(10):
                while not condition():
                    number += 1
                    publisher.publish(b"router", RouterPresence("r", "i", number))
                    await asyncio.sleep(0.005)

        await publish_until(lambda: heard["good"] and heard["bad"])
        nodes.revoke("bad")
        await publish_until(lambda: transport.num_cut == 1)
        last = number
        await publish_until(lambda: number > last + 100 and heard["good"][-1] > last + 50)
        assert heard["bad"][-1] <= last
        # Nothing was lost by who stayed.
        assert heard["good"] == list(range(heard["good"][0], heard["good"][-1] + 1))

    with_nodes(tmp_path, main)


def test_a_process_leaves_peers_whose_keys_were_revoked(tmp_path):
    """Connections to a revoked node are given up as those from it, until it is admitted again."""

    async def main(nodes):
        key = nodes.admit("far")
        far = nodes.transport("far")
        far_dir = str(tmp_path / "far")
        allow_peer(far_dir, "server", nodes.server_key)
        far.refresh_keys()
        server = nodes.server()
        asked, told, lost = [], [], []
        listener = nodes.keep(
            RouterSocket(far, ANYWHERE, ASKS, lambda i, message, f: asked.append(message))
        )
        bus = nodes.keep(PublisherSocket(far, ANYWHERE))
        link = nodes.keep(
            DealerSocket(
                server,
                listener.endpoint,
                ANSWERS,
                lambda m, f: None,
                server_key=key,
                on_gone=lambda: lost.append(1),
            )
        )
        subscriber = nodes.keep(
            SubscriberSocket(server, Decoder(BusMessage), lambda t, m: told.append(m.seq))
        )
        subscriber.connect(bus.endpoint, key)
        number = 0

        def talk():
            nonlocal number
            number += 1
            link.send(ProbeInstance(number))
            bus.publish(b"router", RouterPresence("r", "i", number))

        async def talk_until(condition):
            async with asyncio.timeout(10):
                while not condition():
                    talk()
                    await asyncio.sleep(0.005)

        await talk_until(lambda: asked and told)
        nodes.revoke("far")
        await talk_until(lambda: lost)
        link.discard_queued()
        assert not link.connected
        await asyncio.sleep(0.1)
        before = len(asked), len(told)
        for _ in range(20):
            talk()
            await asyncio.sleep(0.005)
        assert (len(asked), len(told)) == before
        nodes.admit("far")
        await talk_until(lambda: len(asked) > before[0] and len(told) > before[1])

    with_nodes(tmp_path, main)


def test_one_socket_that_fails_keeps_no_other_from_cutting(tmp_path):
    class Failing:
        def keys_changed(self):
            raise OSError("of no use")

    async def main(nodes):
        nodes.admit("bad", "router")
        server = nodes.server()
        failing = [Failing() for _ in range(8)]
        for one in failing[:4]:
            server.watch_keys(one)
        router, _, gone = hearing(nodes, server)
        for one in failing[4:]:
            server.watch_keys(one)
        bad = nodes.dealer("bad", router.endpoint, ANSWERS)
        bad.send(AssignRole("both", 1))
        await until(lambda: router.peers)
        nodes.revoke("bad")
        await until(lambda: gone)

    with_nodes(tmp_path, main)


def test_a_clients_role_is_its_file_s_and_may_change(tmp_path):
    async def main(nodes):
        nodes.admit("someone", "client")
        transport = nodes.server()
        heard = []
        front = nodes.keep(
            RouterSocket(
                transport,
                ANYWHERE,
                ASKS,
                lambda identity, message, frames: heard.append(message),
                domain=CLIENT_DOMAIN,
            )
        )
        someone = nodes.dealer("someone", front.endpoint, ANSWERS)
        someone.send(AssignRole("prefill", 3))
        await until(lambda: transport.num_refused == 1)
        nodes.admit("someone", "router", "client")
        await until(lambda: "router" in transport.peer(nodes.keys["someone"], CLIENT_DOMAIN).roles)
        someone.send(AssignRole("prefill", 4))
        await until(lambda: heard == [AssignRole("prefill", 4)])

    with_nodes(tmp_path, main)


def test_a_name_that_another_key_had_is_not_taken_for_it(tmp_path):
    """A client may choose its connection's name; it is the key that counts."""

    async def main(nodes):
        nodes.admit("router", "router")
        nodes.admit("client", "client")
        nodes.admit("client", "worker")
        transport = nodes.server()
        router, heard, gone = hearing(nodes, transport)
        first = raw_curve(zmq.DEALER, nodes.server_key, *pair_of(tmp_path / "router"))
        first.routing_id = b"the-name"
        first.connect(router.endpoint)
        first.send(encode(ProbeInstance(1)))
        await until(lambda: heard)
        first.context.destroy(linger=0)
        second = raw_curve(zmq.DEALER, nodes.server_key, *pair_of(tmp_path / "client"))
        second.routing_id = b"the-name"
        second.connect(router.endpoint)
        second.send(encode(ProbeInstance(2)))
        await until(lambda: transport.num_refused and gone)
        assert [message.nonce for _, message in heard] == [1]
        assert gone == [b"the-name"]
        second.context.destroy(linger=0)

    with_nodes(tmp_path, main)


def test_key_files_that_are_none_admit_nobody_and_harm_nobody(tmp_path):
    async def main(nodes):
        nodes.admit("good")
        nodes.admit("bad")
        transport = nodes.server()
        router, heard, _ = hearing(nodes, transport)
        good = nodes.dealer("good", router.endpoint, ANSWERS)
        bad = nodes.dealer("bad", router.endpoint, ANSWERS)
        for one in (good, bad):
            one.send(ProbeInstance(1))
        await until(lambda: len(heard) == 2)
        allowed = tmp_path / "server" / "allowed"
        (allowed / "bad.key").write_text("nothing")
        (allowed / "far.key").write_bytes(b"\xff" * 100)
        (allowed / "role.key").write_text(f'roles = "king"\npublic-key = "{"k" * 40}"\n')
        (allowed / "link.key").symlink_to(tmp_path / "nowhere")
        (allowed / "folder.key").mkdir()
        await until(lambda: not bad.connected)
        good.send(ProbeInstance(2))
        await until(lambda: len(heard) == 3)
        assert transport.peer("k" * 40, CLIENT_DOMAIN) is None

    with_nodes(tmp_path, main)


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_connections_are_bounded(tmp_path, kind):
    """Beyond the bound they are cut; those that were there first are served as ever."""

    async def main():
        transport = Transport()
        heard = []
        endpoint = ANYWHERE if kind == "tcp" else f"ipc://{tmp_path}/s"
        router = RouterSocket(
            transport,
            endpoint,
            BOTH,
            lambda identity, message, frames: heard.append(message.id),
            limits=SocketLimits(max_connections=20),
        )
        context = zmq.Context()
        first = context.socket(zmq.DEALER)
        first.connect(router.endpoint)
        first.send(encode(AbortRequest(id=1)))
        await until(lambda: heard == [1])
        mute = [connect_raw(router.endpoint) for _ in range(120)]
        await until(lambda: transport.num_cut >= 100)
        first.send(encode(AbortRequest(id=2)))
        await until(lambda: heard == [1, 2])
        # The others are closed when they have said nothing for the handshake's time.
        await until(lambda: all(closed(one) for one in mute))
        late = context.socket(zmq.DEALER)
        late.connect(router.endpoint)
        late.send(encode(ListModels(id=3)))
        await until(lambda: heard == [1, 2, 3])
        await until(lambda: len(router._connections) == 2)
        for one in mute:
            one.close()
        context.destroy(linger=0)
        router.close()
        transport.close()

    run(main())


def connect_raw(endpoint):
    """A connection that says nothing."""
    scheme, _, where = endpoint.partition("://")
    family = sockets.AF_INET if scheme == "tcp" else sockets.AF_UNIX
    one = sockets.socket(family)
    host, _, port = where.rpartition(":")
    one.connect((host, int(port)) if scheme == "tcp" else where)
    one.setblocking(False)
    return one


def closed(one):
    """Whether the other side has closed it. (It greets first.)"""
    try:
        while one.recv(1024):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def test_the_bound_follows_from_the_files_that_may_be_open(monkeypatch):
    import resource

    for soft, most in ((64, 16), (32, 8), (1024, 496), (1 << 20, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert connection_limit(SocketLimits()) == most


def test_sockets_of_a_context_that_has_no_more_are_an_error_of_ours():
    async def main():
        transport = Transport()
        transport._context.set(zmq.MAX_SOCKETS, 9)
        opened = []
        with pytest.raises(BackpressureError):
            while len(opened) < 20:
                opened += [PublisherSocket(transport, f"inproc://{len(opened)}")]
        opened.pop().close()
        for _ in range(20):  # each finds room for its socket, and none for what watches it
            with pytest.raises(BackpressureError):
                RouterSocket(transport, ANYWHERE, BOTH, lambda i, m, f: None)
        for thing in (*opened, transport):
            thing.close()

    run(main())


def test_ipc_sockets_are_the_users_alone_wherever_they_lie(tmp_path):

    async def main():
        transport = Transport()
        router = RouterSocket(transport, f"ipc://{tmp_path}/s", BOTH, lambda i, m, f: None)
        assert os.stat(tmp_path / "s").st_mode & 0o077 == 0
        # A link in the way of the lock is not followed, one in the way of the socket is replaced.
        (tmp_path / "victim").write_text("mine")
        (tmp_path / "t.lock").symlink_to(tmp_path / "victim")
        with pytest.raises(ListenError):
            RouterSocket(transport, f"ipc://{tmp_path}/t", BOTH, lambda i, m, f: None)
        (tmp_path / "u").symlink_to(tmp_path / "victim")
        other = RouterSocket(transport, f"ipc://{tmp_path}/u", BOTH, lambda i, m, f: None)
        assert (tmp_path / "victim").read_text() == "mine"
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
        with pytest.raises(ConfigError, match="everybody"):
            RouterSocket(transport, f"ipc://{open_to_all}/s", BOTH, lambda i, m, f: None)
        for thing in (router, other, transport):
            thing.close()

    run(main())


@pytest.mark.parametrize("folder", ["allowed", "clients"])
def test_lists_that_others_may_write_are_refused(tmp_path, folder):
    """An empty one, too: somebody else may be the first to write there."""
    nodes = Nodes(tmp_path)
    path = tmp_path / "server" / folder
    path.mkdir(exist_ok=True)
    os.chmod(path, 0o777)
    with pytest.raises(ConfigError, match="written by others"):
        Transport(Security.load(nodes.server_dir))


def test_a_list_that_others_may_write_by_now_admits_nobody_new(tmp_path):
    nodes = Nodes(tmp_path)
    known, gone = nodes.admit("known", "router"), nodes.admit("gone", "router")
    transport = Transport(Security.load(nodes.server_dir))
    try:
        folder = tmp_path / "server" / "allowed"
        os.chmod(folder, 0o777)
        nodes.admit("known", "router", "master")
        new = nodes.admit("new", "router")
        nodes.revoke("gone")
        transport.refresh_keys()
        # Who raised himself to more is nobody until the list is ours again.
        assert transport.peer(known, CLUSTER_DOMAIN) is None
        assert transport.peer(new, CLUSTER_DOMAIN) is None
        assert transport.peer(gone, CLUSTER_DOMAIN) is None
        nodes.admit("known", "router")
        transport.refresh_keys()
        os.chmod(folder, 0o700)
        transport.refresh_keys()
        assert transport.peer(known, CLUSTER_DOMAIN).roles == {PeerRole.ROUTER}
        assert transport.peer(new, CLUSTER_DOMAIN) is not None
    finally:
        transport.close()


FEW_FILES = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket

async def main():
    router = RouterSocket(
        Transport(), "tcp://127.0.0.1:0", Decoder(ClientMessage),
        lambda identity, message, frames: router.send(identity, message),
    )
    print(router.endpoint, flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    await ended.wait()

asyncio.run(main())
import os; os._exit(0)
"""


@pytest.mark.process
def test_mute_connections_do_not_use_up_a_process_s_files(tmp_path):
    """64 files and 120 connections that say nothing: somebody who speaks is served all the same."""
    child = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        endpoint = child.stdout.readline().strip()
        mute = [connect_raw(endpoint) for _ in range(120)]
        context = zmq.Context()
        peer = context.socket(zmq.DEALER)
        peer.connect(endpoint)
        deadline = time.monotonic() + 20
        while True:  # its first connection may be one too many
            peer.send(encode(AbortRequest(id=7)))
            if peer.poll(250):
                break
            assert time.monotonic() < deadline
        assert peer.recv() == encode(AbortRequest(id=7))
        # Closed at last: those that were too many at once, the others for their silence.
        while not all(closed(one) for one in mute):
            assert time.monotonic() < deadline
            time.sleep(0.02)  # a poll, bounded by the deadline above
        assert len(os.listdir(f"/proc/{child.pid}/fd")) < 40
        for one in mute:
            one.close()
        context.destroy(linger=0)
        child.stdin.close()
        assert child.wait(20) == 0
