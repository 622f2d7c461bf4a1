"""Sockets that demand keys: who is heard, and as whom."""

from __future__ import annotations

import asyncio

import zmq

from tests.security.keyed_peers import pair_of, raw_curve, until, with_nodes
from tests.security.socket_words import ANSWERS, ANYWHERE, ASKS, hearing
from xllm.protocol.codec import encode
from xllm.protocol.instance import AssignRole, ProbeInstance
from xllm.protocol.transport.allow_list import CLIENT_DOMAIN
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import Security


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
