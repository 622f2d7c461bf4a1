"""The election on a real etcd that freezes and is started again: one leader, rising epochs."""

from __future__ import annotations

import asyncio

import pytest

from tests.registry.etcd_server import one_etcd
from tests.registry.watcher import run, until
from xllm.protocol.registry.etcd import EtcdRegistry
from xllm.protocol.registry.etcd_address import parse_etcd_address
from xllm.router.leadership.candidate import Candidate

pytestmark = [pytest.mark.process, pytest.mark.etcd]

KEY = "/xllm/default/leader"
BASE_KEY = "/xllm/default/epoch_base"
TTL_S = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with one_etcd(tmp_path_factory.mktemp("etcd")) as member:
        yield member


class Runner:
    """A candidate with a registry of its own; `epochs`: those under which it ever led."""

    def __init__(self, server, name):
        self.registry = EtcdRegistry(parse_etcd_address(server.address), timeout_s=1.0)
        self.epochs = []
        self._tasks = set()
        self.candidate = Candidate(
            self.registry,
            KEY,
            BASE_KEY,
            lambda base: name.encode(),
            TTL_S,
            self._changed,
            self._spawn,
        )

    @property
    def leads(self):
        return bool(self.candidate.epoch)

    def _changed(self):
        epoch = self.candidate.epoch
        if epoch and epoch not in self.epochs:
            self.epochs.append(epoch)

    def _spawn(self, coroutine):
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self):
        self.candidate.close()
        await self.registry.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_there_is_one_leader_at_a_time_whatever_etcd_does(server, how):
    async def main():
        runners = [Runner(server, name) for name in ("one", "two")]

        def leaders():
            found = [one for one in runners if one.leads]
            assert len(found) < 2
            return found

        for one in runners:
            await one.candidate.start()
        await until(leaders, "a leader")
        first = leaders()[0].candidate.epoch
        entry = await runners[0].registry.get(KEY)
        assert entry.create_revision == first
        getattr(server, how)()
        await until(lambda: not leaders(), "its end by its own clock")
        if how == "freeze":
            server.thaw()
        else:
            server.start()
        await until(leaders, "another term")
        second = leaders()[0].candidate.epoch
        assert second > first
        assert await leaders()[0].registry.write_guarded(KEY, second, [("/xllm/x", b"")])
        assert not await runners[0].registry.write_guarded(KEY, first, [("/xllm/x", b"late")])
        epochs = [epoch for one in runners for epoch in one.epochs]
        assert len(set(epochs)) == len(epochs)
        await leaders()[0].candidate.resign()
        await until(leaders, "the next after a resignation")
        assert leaders()[0].candidate.epoch > second
        for one in runners:
            await one.close()

    run(main())
