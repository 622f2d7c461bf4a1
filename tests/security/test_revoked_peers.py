"""Who is cut when a key is revoked, in both directions, and who is not."""

from __future__ import annotations

import asyncio
import time

from tests.security.keyed_peers import until, with_nodes
from tests.security.socket_words import ANSWERS, ANYWHERE, ASKS, hearing
from xllm.cli.keys import allow_peer
from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import AssignRole, ProbeInstance
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket


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
            nodes.keep(
                SubscriberSocket(
                    nodes.transport(name),
                    publisher.endpoint,
                    Decoder(BusMessage),
                    lambda topic, message, words=words: words.append(message.seq),
                    server_key=nodes.server_key,
                )
            )
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
        nodes.keep(
            SubscriberSocket(
                server,
                bus.endpoint,
                Decoder(BusMessage),
                lambda t, m: told.append(m.seq),
                server_key=key,
            )
        )
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
