"""Nodes with keys, for tests: made in a directory, admitted by each other, with sockets."""

from __future__ import annotations

import asyncio
import os
import pathlib

import uvloop
import zmq

from xllm.cli.keys import allow_peer, revoke_peer
from xllm.protocol.bus import BusMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.transport.context import KEYS_PERIOD_S, Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import SubscriberSocket
from xllm.protocol.transport.security import Security, create_keys

CUT_S = 1.0
"""What is promised; tests give a busy machine ten times as much."""


def run(coroutine):
    """On the loop that processes use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


async def until(condition, timeout=10 * CUT_S):
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.002)


class Nodes:
    """Keys of a server and of its peers. Closes what it opened."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.server_dir = str(folder / "server")
        self.server_key = create_keys(self.server_dir)
        self.keys: dict[str, str] = {}
        self._opened: list = []

    def admit(self, name: str, *roles: str) -> str:
        """A peer with a pair of its own, on the server's list."""
        if name not in self.keys:
            self.keys[name] = create_keys(str(self.folder / name))
        allow_peer(self.server_dir, name, self.keys[name], roles=roles)
        return self.keys[name]

    def revoke(self, name: str) -> None:
        """Take a peer off the server's list."""
        assert revoke_peer(self.server_dir, name) == [name]

    def server(self) -> Transport:
        """The server's transport, which looks at its lists as an actor's does."""
        transport = self.keep(Transport(Security.load(self.server_dir)))

        async def look():
            while True:
                await asyncio.sleep(KEYS_PERIOD_S)
                transport.refresh_keys()

        self._looking = asyncio.ensure_future(look())
        return transport

    def transport(self, name: str) -> Transport:
        """A peer's transport."""
        return self.keep(Transport(Security.load(str(self.folder / name))))

    def dealer(
        self, name: str, endpoint: str, decoder: Decoder, heard=lambda message: None, **more
    ) -> DealerSocket:
        """A connection of a peer; `heard(message)` hears its answers."""
        return self.keep(
            DealerSocket(
                self.transport(name),
                endpoint,
                decoder,
                lambda message, frames: heard(message),
                server_key=self.server_key,
                **more,
            )
        )

    def subscriber(self, name: str, endpoint: str, heard) -> SubscriberSocket:
        """A peer's subscriber to a bus of the server."""
        return self.keep(
            SubscriberSocket(
                self.transport(name),
                endpoint,
                Decoder(BusMessage),
                heard,
                server_key=self.server_key,
            )
        )

    def keep(self, thing):
        """Close it at the end, before what it was made from."""
        self._opened.append(thing)
        return thing

    async def close(self) -> None:
        """Close all."""
        if hasattr(self, "_looking"):
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for thing in reversed(self._opened):
            closed = thing.close()
            if closed is not None:
                await closed


def with_nodes(tmp_path, main):
    """Run `main(nodes)` and close what it opened."""

    async def body():
        nodes = Nodes(tmp_path)
        try:
            await main(nodes)
        finally:
            await nodes.close()

    run(body())


def raw_curve(kind: int, server_key: str, public: bytes, secret: bytes) -> zmq.Socket:
    """A socket of libzmq's own, as a stranger has it."""
    socket = zmq.Context().socket(kind)
    socket.linger = 0
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey, socket.curve_secretkey = public, secret
    return socket


def pair_of(keys_dir) -> tuple[bytes, bytes]:
    """Public and secret key of a directory."""
    security = Security.load(os.fspath(keys_dir))
    return security.public_key.encode(), security.secret_key.encode()
