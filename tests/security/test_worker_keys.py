"""A rank is its key's: no other key with the role of a worker takes its place, or speaks for it."""

from __future__ import annotations

import dataclasses

import pytest
import structlog

from tests.master.test_master_actor import make_settings
from tests.security.keyed_peers import Nodes, until, with_nodes
from xllm.cli.keys import allow_peer
from xllm.master.actor import MasterActor
from xllm.protocol.codec import Decoder
from xllm.protocol.step import LoadModel, MasterMessage, RankNotice, StopWorker, WorkerHello


class Bench:
    """A master with keys, and workers that only talk."""

    def __init__(self, nodes: Nodes, run_dir, num_workers: int = 1) -> None:
        settings = make_settings(run_dir)
        own = dataclasses.replace(
            settings.master, num_workers=num_workers, worker_endpoint="tcp://127.0.0.1:0"
        )
        self.nodes = nodes
        self.transport = nodes.server()
        self.master = MasterActor(dataclasses.replace(settings, master=own), None, self.transport)

    def worker(self, name: str, rank: int):
        """A connection with that key that says to be that rank, and what it hears."""
        self.nodes.admit(name, "worker")
        allow_peer(str(self.nodes.folder / name), "server", self.nodes.server_key)
        heard: list[MasterMessage] = []
        socket = self.nodes.dealer(
            name, self.master.workers.endpoint, Decoder(MasterMessage), heard.append
        )
        socket.send(WorkerHello(rank, "1", 0, "cpu"))
        return socket, heard


@pytest.fixture
def on_bench(tmp_path, run_dir):
    def run(test, num_workers=1):
        async def main(nodes):
            bench = Bench(nodes, run_dir, num_workers)
            await bench.master.open()
            try:
                await test(bench)
            finally:
                await bench.master.close()

        with_nodes(tmp_path, main)

    return run


def test_a_rank_that_is_there_is_not_taken_by_another_key(on_bench):
    async def test(bench):
        _, first = bench.worker("first", 0)
        await until(lambda: first)
        with structlog.testing.capture_logs() as logs:
            _, evil = bench.worker("evil", 0)
            await until(lambda: evil)
        assert list(map(type, evil)) == [StopWorker]
        assert list(map(type, first)) == [LoadModel]
        assert bench.transport.num_refused == 1
        assert [one["event"] for one in logs].count("worker_refused") == 1
        # Another connection of the same key replaces the one that was, as a worker that came back.
        _, again = bench.worker("first", 0)
        await until(lambda: again)
        assert list(map(type, again)) == [LoadModel]

    on_bench(test)


def test_a_rank_whose_connection_went_is_free(on_bench):
    async def test(bench):
        socket, first = bench.worker("first", 0)
        await until(lambda: first)
        socket.close()
        await until(lambda: bench.master.workers.links[0].identity is None)
        _, second = bench.worker("second", 0)
        await until(lambda: second)
        assert list(map(type, second)) == [LoadModel]

    on_bench(test)


def test_where_the_master_starts_its_workers_they_have_its_key(on_bench, monkeypatch):
    async def test(bench):
        monkeypatch.setattr(bench.master.workers._processes, "_target", lambda settings: None)
        _, evil = bench.worker("evil", 0)
        await until(lambda: evil)
        assert list(map(type, evil)) == [StopWorker]
        assert bench.master.workers.links[0].identity is None

    on_bench(test)


def test_a_rank_tells_the_others_of_itself_only(on_bench):
    async def test(bench):
        zero, heard_0 = bench.worker("zero", 0)
        _, heard_1 = bench.worker("one", 1)
        await until(lambda: heard_0 and heard_1)
        group = heard_0[0].group
        zero.send(RankNotice(1, group, "k", b"forged"))
        zero.send(RankNotice(0, group, "k", b"true"))
        await until(lambda: len(heard_1) > 1)
        assert heard_1[1:] == [RankNotice(0, group, "k", b"true")]
        assert len(heard_0) == 1
        assert bench.transport.num_refused == 1

    on_bench(test, num_workers=2)
