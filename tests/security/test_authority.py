"""Who may say what: every cell of the table, on real sockets, and nothing beside it."""

from __future__ import annotations

import ast
import asyncio
import pathlib
import tempfile
import typing

import msgspec
import pytest

from scripts.docs.examples import example, members
from tests.architecture.sources import sources
from tests.security.keyed_peers import Nodes, run, until
from xllm.protocol import records
from xllm.protocol.authority import (
    CONVERSATIONS,
    EVERY_ROLE,
    KEY_RULES,
    MATRIX,
    SHARED_RULE,
    PeerRole,
    Subscribe,
    may_say,
    rule_of,
)
from xllm.protocol.bus import RouterPresence
from xllm.protocol.client import BadMessage, ClientMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import RequestFailed
from xllm.protocol.instance import FrameRefused
from xllm.protocol.questions import ListModels
from xllm.protocol.transport.allow_list import CLIENT_DOMAIN
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket

HEARD = {name: list(members(union)) for name, (_, union) in CONVERSATIONS.items()}
SPEAKERS = {
    "client": {"client", "admin"},
    "instance": {"router"},
    "step": {"worker"},
    "cache": {"master", "worker"},
    "registry": {"router", "master", "daemon", "admin"},
    "launch": {"router", "master", "worker", "daemon"},
    "bus": {"router", "master", "daemon"},
}
"""Who speaks in a conversation, written down a second time."""
EXCEPTIONS = {
    "SetModelSleep": {"admin"},
    "SetRole": {"admin"},
    "SetObjectives": {"admin"},
    "QuerySnapshot": {"router"},
    "GuardedWrite": {"router"},
}


def expected(conversation, message):
    return EXCEPTIONS.get(message.__name__, SPEAKERS[conversation])


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
@pytest.mark.parametrize("role", list(PeerRole))
def test_every_cell(conversation, role):
    for message in HEARD[conversation]:
        allowed = role.value in expected(conversation, message)
        assert may_say(frozenset((role,)), message) is allowed, message


def test_no_message_is_forgotten_and_no_row_is_idle():
    every = {message for messages in HEARD.values() for message in messages}
    assert every - MATRIX.keys() == set(), "add their rows to protocol/authority.py"
    assert MATRIX.keys() - every == set()
    assert all(roles and roles < EVERY_ROLE for roles in MATRIX.values())


def test_what_stands_in_no_row_is_said_by_nobody():
    assert not may_say(EVERY_ROLE, RouterPresence)
    assert not may_say(EVERY_ROLE, RequestFailed)
    assert not may_say(frozenset(), ListModels)
    for key in ("", "/", "leader", "/xllm/", "/xllm/c", "/xllm//x", "/xllm/c/", "/etcd/c/leader"):
        assert rule_of(key) == SHARED_RULE
    assert all(rule.writers < EVERY_ROLE for rule in (*KEY_RULES.values(), SHARED_RULE))


def test_every_listening_socket_is_in_the_table():
    """Each RouterSocket of the package decodes a union that the table knows as a conversation."""
    known = {
        "ClientMessage",
        "InstanceRequest",
        "WorkerMessage",
        "RegistryRequest",
        "LaunchMessage",
    }
    known |= {"CacheRequest | QuerySnapshot"}
    found = set()
    for source in sources("xllm"):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id != "RouterSocket":
                continue
            decoder = next(arg for arg in node.args if "Decoder" in ast.unparse(arg))
            assert isinstance(decoder, ast.Call)
            found.add(ast.unparse(decoder.args[0]))
    assert found == known


def test_every_registered_kind_has_a_rule():
    made = [getattr(records, name) for name in vars(records) if name.endswith("_key")]
    for make in made:
        parameters = len(typing.get_type_hints(make)) - 1
        kind = make(*(["c", "n"][:parameters])).split("/")[3]
        assert kind in KEY_RULES or rule_of(f"/xllm/c/{kind}") == SHARED_RULE
    assert {"instances", "daemons", "routers"} <= KEY_RULES.keys()


def test_every_cell_on_a_real_socket():
    """One listener that decodes everything; a peer of each role says everything once."""
    spoken = {}
    for messages in HEARD.values():
        spoken |= {message.__name__: message for message in messages if message is not Subscribe}
    every = list(spoken.values())
    arrays: Decoder = Decoder(_union(c for c in every if c not in HEARD["client"]))
    maps: Decoder = Decoder(ClientMessage)

    async def main(nodes):
        for role in PeerRole:
            nodes.admit(role.value, role.value)
        transport = nodes.server()
        num_refused = 0
        inner = set(every) - set(HEARD["client"])
        for decoder, classes in ((arrays, inner), (maps, HEARD["client"])):
            heard, refused = set(), {}
            listener = nodes.keep(
                RouterSocket(
                    transport,
                    "tcp://127.0.0.1:0",
                    decoder,
                    lambda identity, message, frames: heard.add(
                        (listener.peer(identity).name, type(message).__name__)
                    ),
                    bad_reply=lambda text: FrameRefused(text),
                    denied_reply=lambda message, text: FrameRefused(type(message).__name__),
                    domain=CLIENT_DOMAIN,
                )
            )
            for role in PeerRole:
                answers = refused[role.value] = []
                dealer = nodes.dealer(
                    role.value, listener.endpoint, Decoder(FrameRefused), answers.append
                )
                for message in classes:
                    dealer.send(example(message, full=False))
            total = len(PeerRole) * len(classes)
            await until(lambda: len(heard) + sum(map(len, refused.values())) == total)
            for role in PeerRole:
                for message in classes:
                    allowed = may_say(frozenset((role,)), message)
                    assert ((role.value, message.__name__) in heard) is allowed
                    denied = FrameRefused(message.__name__) in refused[role.value]
                    assert denied is not allowed
            num_refused += sum(map(len, refused.values()))
            assert transport.num_refused == num_refused > 0

    _with_nodes(main)


def test_subscribing_on_a_real_socket():
    async def main(nodes):
        names = [role.value for role in PeerRole if role.value not in ("client", "admin")]
        for name in names:
            nodes.admit(name, name)
        publisher = nodes.keep(PublisherSocket(nodes.server(), "tcp://127.0.0.1:0"))
        heard = set()
        for name in names:
            nodes.subscriber(name, publisher.endpoint, lambda t, m, name=name: heard.add(name))
        refused = publisher._transport

        async def publish():
            while True:
                publisher.publish(b"router", RouterPresence("r", "i", 1))
                await asyncio.sleep(0.005)

        publishing = asyncio.ensure_future(publish())
        await until(lambda: heard == SPEAKERS["bus"] and refused.num_refused)
        publishing.cancel()

    _with_nodes(main)


def test_a_refusal_at_the_client_port_is_the_end_of_the_request():
    """The front's own answers: `failed` with permission_denied and the client's number."""
    from xllm.router.zmq_front import ZmqFront

    class Service:
        def models(self):
            return ()

        def status(self):
            raise AssertionError("not asked")

    async def main(nodes):
        nodes.admit("app", "client")
        transport = nodes.server()
        front = nodes.keep(
            ZmqFront(transport, "tcp://127.0.0.1:0", Service(), asyncio.ensure_future)
        )
        answers = []
        app = nodes.dealer("app", front.endpoint, Decoder(RouterMessage), answers.append)
        from xllm.protocol.administration import SetModelSleep

        app.send(SetModelSleep(id=7, model="m", asleep=True))
        app.send(ListModels(id=8))
        await until(lambda: len(answers) == 2)
        assert (answers[0].id, answers[0].code) == (7, "permission_denied")
        assert answers[1].id == 8
        assert not any(isinstance(one, BadMessage) for one in answers)

    _with_nodes(main)


def _union(classes) -> typing.Any:
    found: typing.Any = None
    for one in classes:
        assert issubclass(one, msgspec.Struct)
        found = one if found is None else found | one
    return found


def _with_nodes(main):
    async def body():
        with tempfile.TemporaryDirectory() as folder:
            nodes = Nodes(pathlib.Path(folder))
            try:
                await main(nodes)
            finally:
                await nodes.close()

    run(body())
