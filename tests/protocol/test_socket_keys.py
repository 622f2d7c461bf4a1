"""Keys of sockets: whom they admit where, and what their files must be."""

import os

import pytest
import zmq

from tests.protocol.socket_pairs import BOTH, run, until
from xllm.errors import BrokenError, ConfigError
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket, Reach
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import CLIENT_DOMAIN, Security, create_keys


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
        assert bad.reach is Reach.REFUSED
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
    absent = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match=f"no usable key.*`xllm keys make {absent}`") as caught:
        Security.load(absent)
    assert "Errno" not in caught.value.message
