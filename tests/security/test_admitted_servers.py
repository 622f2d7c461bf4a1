"""Whom a process speaks to: peers that the registry names must be on this node's own list."""

from __future__ import annotations

import asyncio

import pytest

from tests.security.keyed_peers import with_nodes
from xllm.cli.keys import allow_peer
from xllm.errors import BrokenError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage, RouterPresence
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, InstanceRequest, ProbeInstance
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import create_keys

ASKS: Decoder = Decoder(InstanceRequest)
ANSWERS: Decoder = Decoder(InstanceReply)
ANYWHERE = "tcp://127.0.0.1:0"


@pytest.mark.parametrize("role", ["", "router"])
def test_a_peer_of_the_registry_must_be_admitted_in_its_role(tmp_path, role):
    """A key that was revoked before this process started, or that has another role, is no
    master's, whatever the registry says; once it is one it is spoken to."""

    async def main(nodes):
        key = nodes.admit("far", role) if role else create_keys(str(tmp_path / "far"))
        nodes.keys["far"] = key
        far = nodes.transport("far")
        allow_peer(str(tmp_path / "far"), "server", nodes.server_key)
        far.refresh_keys()
        server = nodes.server()
        asked, told = [], []
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
                server_role=PeerRole.MASTER,
            )
        )
        nodes.keep(
            SubscriberSocket(
                server,
                bus.endpoint,
                Decoder(BusMessage),
                lambda t, m: told.append(m.seq),
                server_key=key,
                server_role=PeerRole.MASTER,
            )
        )
        # The same key given by hand is trusted: it is told apart from the registry's word.
        given = nodes.keep(
            DealerSocket(server, listener.endpoint, ANSWERS, lambda m, f: None, server_key=key)
        )
        link.send(ProbeInstance(1))
        async with asyncio.timeout(10):
            while not asked:
                given.send(ProbeInstance(2))
                bus.publish(b"router", RouterPresence("r", "i", 1))
                await asyncio.sleep(0.005)
        assert not link.connected
        assert ProbeInstance(1) not in asked
        assert not told
        nodes.admit("far", "master")
        async with asyncio.timeout(10):
            while not (ProbeInstance(1) in asked and told):
                bus.publish(b"router", RouterPresence("r", "i", 2))
                await asyncio.sleep(0.005)

    with_nodes(tmp_path, main)


def test_a_process_with_keys_speaks_to_no_instance_without(tmp_path):
    async def main(nodes):
        server = nodes.server()
        for connect in (
            lambda: DealerSocket(
                server, "tcp://127.0.0.1:1", ANSWERS, print, server_role=PeerRole.MASTER
            ),
            lambda: SubscriberSocket(
                server,
                "tcp://127.0.0.1:1",
                Decoder(BusMessage),
                print,
                server_role=PeerRole.MASTER,
            ),
        ):
            with pytest.raises(BrokenError, match="has no key"):
                connect()

    with_nodes(tmp_path, main)
