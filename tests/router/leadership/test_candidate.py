"""Candidates at a registry: the embedded one, in this process, and a real etcd."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.registry.etcd_server import one_etcd
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.open import open_registry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.transport.context import Transport
from xllm.router.leadership.candidate import Candidate

KEY = "/xllm/c/leader"
LEASE_S = 2.0
DEADLINE_S = 40.0


class Runner:
    """A candidate, and how often it was told that something changed."""

    def __init__(self, registry, name: str) -> None:
        self.registry = registry
        self.num_changes = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.candidate = Candidate(
            registry, KEY, name.encode(), LEASE_S, self._changed, self._spawn
        )

    def _changed(self) -> None:
        self.num_changes += 1

    def _spawn(self, coroutine) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))

    async def leads(self) -> int:
        while not self.candidate.epoch:
            await asyncio.sleep(0.01)
        return self.candidate.epoch

    async def close(self) -> None:
        self.candidate.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def hand_over(registries) -> None:
    """One resigns and another leads at once; that one dies and the third leads in time."""
    one, two, three = (Runner(registry, str(n)) for n, registry in enumerate(registries))
    try:
        await one.candidate.start()
        first = await one.leads()
        assert one.candidate.entry.create_revision == first
        assert await one.registry.write_guarded(KEY, first, [("/xllm/c/roles", b"{}")])
        await two.candidate.start()
        assert two.candidate.entry.create_revision == first
        assert two.candidate.epoch == 0
        await one.candidate.resign()
        assert one.candidate.epoch == 0
        second = await two.leads()
        assert second > first
        assert not await one.registry.write_guarded(KEY, first, [("/xllm/c/roles", b"late")])
        assert (await two.registry.get("/xllm/c/roles")).value == b"{}"
        await three.candidate.start()
        assert three.candidate.epoch == 0
        began = time.monotonic()
        await two.close()
        third = await three.leads()
        assert third > second
        assert time.monotonic() - began < DEADLINE_S / 2
        assert one.candidate.epoch == 0, "who resigned runs no more"
        assert three.num_changes >= 2
    finally:
        for runner in (one, two, three):
            await runner.close()


def test_in_the_embedded_registry():
    async def body() -> None:
        registry = LocalRegistry(RegistryStore())
        try:
            await hand_over([registry] * 3)
        finally:
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


def test_a_leader_that_lost_its_key_steps_down_and_runs_again():
    async def body() -> None:
        registry = LocalRegistry(RegistryStore())
        runner = Runner(registry, "one")
        try:
            await runner.candidate.start()
            epoch = await runner.leads()
            revoked = (await registry.get(KEY)).lease_id
            await registry.revoke(revoked)  # as if it had lapsed
            while runner.candidate.epoch == epoch:
                await asyncio.sleep(0.01)
            assert await runner.leads() > epoch
            runner.candidate.disproved(runner.candidate.epoch)
            assert runner.candidate.epoch == 0
            last = await runner.leads()
            runner.candidate.outbid(last)
            assert runner.candidate.epoch == last
            runner.candidate.outbid(last + 1)
            assert runner.candidate.epoch == 0
        finally:
            await runner.close()
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


@pytest.mark.etcd
def test_in_etcd(tmp_path):
    async def body(address: str) -> None:
        transport = Transport()
        registries = [open_registry(address, transport) for _ in range(3)]
        try:
            await hand_over(registries)
        finally:
            for registry in registries:
                await registry.close()
            transport.close()

    with one_etcd(tmp_path) as member:
        asyncio.run(asyncio.wait_for(body(member.address), DEADLINE_S))
