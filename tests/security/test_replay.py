"""What was recorded and is sent again: bytes of an encrypted connection, and words of the past."""

from __future__ import annotations

import asyncio
import socket
import threading

from tests.master.test_master_actor import expected, stage
from tests.router.test_view import beat, record
from tests.security.keyed_peers import Nodes, run, until
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, InstanceRequest, ProbeInstance
from xllm.protocol.transport.router import RouterSocket
from xllm.router.view import ClusterView


class Recorder:
    """Passes one TCP connection on to a port, and keeps the bytes of its client."""

    def __init__(self, port: int) -> None:
        self.recorded = b""
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        back = threading.Thread(target=self._pass, args=(server, client, False))
        self._threads.append(back)
        back.start()
        self._pass(client, server, True)

    def _pass(self, source, target, keep):
        with source:
            try:
                while data := source.recv(65536):
                    if keep:
                        self.recorded += data
                    target.sendall(data)
                target.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the other direction ended first

    def close(self):
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def test_a_recorded_connection_says_nothing_when_it_is_played_again(tmp_path):
    async def main():
        nodes = Nodes(tmp_path)
        nodes.admit("router", "router")
        heard = []
        listener = nodes.keep(
            RouterSocket(
                nodes.server(),
                "tcp://127.0.0.1:0",
                Decoder[InstanceRequest](InstanceRequest),
                lambda identity, message, frames: heard.append(message),
            )
        )
        port = int(listener.endpoint.rpartition(":")[2])
        recorder = Recorder(port)
        dealer = nodes.dealer(
            "router", f"tcp://127.0.0.1:{recorder.port}", Decoder[InstanceReply](InstanceReply)
        )
        for number in range(20):
            dealer.send(ProbeInstance(number))
        await until(lambda: len(heard) == 20)
        assert len(recorder.recorded) > 20 * 20
        for _ in range(3):
            played = await asyncio.to_thread(play, port, recorder.recorded)
            assert played > 0
        dealer.send(ProbeInstance(100))
        await until(lambda: len(heard) > 20)
        assert heard == [*map(ProbeInstance, range(20)), ProbeInstance(100)]
        assert listener.statistics().num_received == 21
        dealer.close()
        await asyncio.to_thread(recorder.close)
        await nodes.close()

    run(main())


def play(port, data) -> int:
    """Send the bytes of a client again, step by step as a peer reads them; how many came back."""
    came = 0
    with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
        came += len(one.recv(4096))  # it greets first
        try:
            for start in range(0, len(data), 200):
                one.sendall(data[start : start + 200])
            while piece := one.recv(4096):
                came += len(piece)
        except OSError:
            pass  # closed with what was not read yet
    return came


def test_the_same_request_twice_runs_once(run_dir):
    """Sent again by its router or by another it changes nothing; the other is refused."""

    async def scenario():
        async with stage(run_dir, toy_step_ms=5.0) as one:
            other = one.make_router()
            request = one.router.admit("a", range(20, 30), max_tokens=60)
            await one.router.until(lambda: ("a", 1, 0) in one.router.streams)
            other.send(request)
            for _ in range(5):
                one.router.send(request)
            assert (await one.router.ends("a")).code == ""
            assert one.router.streams["a", 1, 0].tokens == expected(request)
            assert (await other.ends("a")).code == "conflict"
            assert other.streams == {}

    asyncio.run(scenario())


def test_heartbeats_of_the_past_are_not_believed():
    view = ClusterView(0.2)
    view.registered(record("a"), 0.0)
    view.connected("a")
    view.heartbeat(beat(seq=5, num_running=7), 0.1)
    for word in (
        beat(seq=4, state="failed"),
        beat(seq=1, num_running=0),
        beat(incarnation="0", seq=9, state="failed"),
    ):
        view.heartbeat(word, 0.2)
        seen = view.get("a")
        assert (seen.seq, seen.state, seen.load.num_running) == (5, "ready", 7)
