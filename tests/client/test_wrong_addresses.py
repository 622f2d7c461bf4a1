"""Addresses where no router is: what cannot be one is refused, and what is found there is told."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import pathlib
import socket
import threading

import pytest

from tests.client.fake_router import FakeRouter
from tests.client.test_async_client import free_endpoint
from xllm import AsyncClient
from xllm.errors import BrokenError, ConfigError, DeadlineError
from xllm.protocol.client import ClientMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket
from xllm.protocol.transport.security import create_keys

WHERE = "; the ZeroMQ address is the one that `xllm serve` prints as ZeroMQ"


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("tcp://127.0.0.1", "is not tcp://host:port with a port from 1 to 65535"),
        ("tcp://127.0.0.1:99999", "is not tcp://host:port with a port from 1 to 65535"),
        ("tcp://127.0.0.1:0", "is not tcp://host:port with a port from 1 to 65535"),
        ("tcp://:8011", "is not tcp://host:port with a port from 1 to 65535"),
        ("tcp://127.0.0.1:8011/", "is not tcp://host:port with a port from 1 to 65535"),
        ("127.0.0.1:8011", "is not tcp://host:port or ipc://path"),
        ("", "is not tcp://host:port or ipc://path"),
        ("ipc://", "is not tcp://host:port or ipc://path"),
        ("inproc://here", "is not tcp://host:port or ipc://path"),
        ("http://127.0.0.1:8000", f"is not tcp://host:port or ipc://path{WHERE}"),
    ],
)
def test_what_cannot_be_an_address_is_refused_at_once(endpoint, told):
    for given in (endpoint, ["tcp://127.0.0.1:8011", endpoint]):
        with pytest.raises(ConfigError) as caught:
            AsyncClient(given)
        assert caught.value.message == f"endpoint: {endpoint!r} {told}"
        assert caught.value.param == "endpoint"


@contextlib.contextmanager
def http_server():
    """A web server's endpoint, as if it were a router's."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_arguments):
            """Nobody reads it."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def silent_server():
    """The endpoint of somebody who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def nobody():
    """An endpoint where nobody listens."""
    yield free_endpoint()


async def told_by(endpoint, connect_timeout_s=0.5, **options) -> str:
    async with AsyncClient(endpoint, connect_timeout_s=connect_timeout_s, **options) as client:
        with pytest.raises(BrokenError) as caught:
            await asyncio.wait_for(client.status(), 20)
    return caught.value.message


@pytest.mark.parametrize(
    ("server", "told", "hint"),
    [
        (nobody, "nothing takes connections there", ""),
        (
            silent_server,
            "something listens there that does not speak ZeroMQ, or stands still",
            WHERE,
        ),
        (http_server, "something listens there that does not speak ZeroMQ, or stands still", WHERE),
    ],
)
def test_what_is_found_at_an_address_is_told(server, told, hint):
    with server() as endpoint:
        message = asyncio.run(told_by(endpoint))
    assert message == f"no router answers at {endpoint} ({told}){hint}"


def test_each_of_several_addresses_is_told():
    with silent_server() as silent, nobody() as empty:
        message = asyncio.run(told_by([empty, silent]))
    assert message == (
        f"no router answers at {empty} (nothing takes connections there), "
        f"{silent} (something listens there that does not speak ZeroMQ, or stands still){WHERE}"
    )


def test_keys_on_one_side_only(tmp_path: pathlib.Path):
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    create_keys(ours)
    server_key = create_keys(theirs)

    async def main() -> None:
        keyless, transport = FakeRouter(), Transport.with_keys(theirs)
        keyed: RouterSocket[ClientMessage] = RouterSocket(
            transport, "tcp://127.0.0.1:0", Decoder(ClientMessage), lambda *_: None
        )
        try:
            # What is wrong is known once the other side has greeted: a busy machine takes a while.
            found = await told_by(keyless.endpoint, 2, keys_dir=ours, server_key=server_key)
            assert found == f"no router answers at {keyless.endpoint} (it speaks without keys)"
            found = await told_by(keyed.endpoint, 2)
            assert found == f"no router answers at {keyed.endpoint} (it speaks with keys only)"
        finally:
            keyless.close()
            keyed.close()
            transport.close()

    asyncio.run(main())


def test_a_time_that_ends_before_any_router_answered_says_so():
    async def main() -> None:
        async with AsyncClient(free_endpoint(), timeout_s=0.1) as client:
            with pytest.raises(DeadlineError, match=r"^no router answered within 0\.1 s$"):
                await client.generate("echo a")

    asyncio.run(main())
