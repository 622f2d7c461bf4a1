"""Connections: who left, who came back, and how a vanished machine is noticed."""

import os
import pathlib
import socket as sockets
import time

from tests.protocol.socket_pairs import BOTH, echo_pair, run, until
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.router import RouterSocket


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
