"""Connections and sockets beyond what a process can hold: who is cut, and who is served."""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import sys
import time

import pytest
import zmq

from tests.security.keyed_peers import run, until
from tests.security.socket_words import ANYWHERE, BOTH
from xllm.errors import BackpressureError
from xllm.protocol.codec import encode
from xllm.protocol.generation import AbortRequest
from xllm.protocol.questions import ListModels
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.limits import SocketLimits, connection_limit
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket


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
