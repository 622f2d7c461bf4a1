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
BASE_KEY = "/xllm/c/epoch_base"
LEASE_S = 2.0
DEADLINE_S = 40.0


class Runner:
    """A candidate, and how often it was told that something changed."""

    def __init__(self, registry, name: str) -> None:
        self.registry = registry
        self.num_changes = 0
        self.name = name
        self.tasks: list[asyncio.Task[None]] = []
        self.candidate = Candidate(
            registry, KEY, BASE_KEY, self._value, LEASE_S, self._changed, self._spawn
        )

    def _value(self, base: int) -> bytes:
        return f"{self.name} {base}".encode()

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
            last = await runner.leads()
            runner.candidate.led(last)
            assert runner.candidate.epoch == 0
            assert await runner.leads() > last
        finally:
            await runner.close()
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


async def next_leader(registry, name: str, known: int = 0) -> int:
    """The epoch of a candidate that leads there once, knows of an epoch, and resigns."""
    runner = Runner(registry, name)
    try:
        runner.candidate.outbid(known)
        await runner.candidate.start()
        epoch = await runner.leads()
        entry = await registry.get(KEY)
        base = int(entry.value.split()[-1])
        assert entry.create_revision == runner.candidate.revision
        assert base + entry.create_revision == epoch
        guarded = await registry.write_guarded(KEY, runner.candidate.revision, [("/x", b"")])
        assert guarded
        await runner.candidate.resign()
        return epoch
    finally:
        await runner.close()


def test_epochs_grow_on_where_revisions_went_back():
    async def body() -> None:
        registry = LocalRegistry(RegistryStore())
        try:
            assert await next_leader(registry, "young") < 100
            assert await registry.get(BASE_KEY) is None
            first = await next_leader(registry, "old", known=7000)
            assert first > 7000
            assert (await registry.get(BASE_KEY)).value == b"7000"
            second = await next_leader(registry, "knows nothing")
            assert second > first
            assert (await registry.get(BASE_KEY)).value == b"7000"
            await registry.put(BASE_KEY, b"many")
            third = await next_leader(registry, "old", known=second)
            assert third > second
            assert (await registry.get(BASE_KEY)).value == str(second).encode()
        finally:
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


def test_a_base_that_another_raises_meanwhile_counts():
    async def body() -> None:
        registry = LocalRegistry(RegistryStore())
        claim = registry.compare_and_set

        async def raised_behind(key, *arguments):
            done = await claim(key, *arguments)
            if key == KEY and (await registry.get(BASE_KEY)) is None:
                await registry.put(BASE_KEY, b"9000")
            return done

        registry.compare_and_set = raised_behind
        try:
            assert await next_leader(registry, "one") > 9000
        finally:
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


@pytest.mark.etcd
def test_an_emptied_etcd_has_leaders_of_higher_epochs(tmp_path):
    async def body(member) -> None:
        transport = Transport()
        registry = open_registry(member.address, transport)
        runner = Runner(registry, "lives on")
        try:
            for number in range(200):
                await registry.put("/x", b"%d" % number)
            await runner.candidate.start()
            first = await runner.leads()
            assert first > 200
            member.empty()
            while runner.candidate.epoch in (0, first):
                await asyncio.sleep(0.01)
            assert runner.candidate.revision < 200
            assert runner.candidate.epoch > first
            last = runner.candidate.epoch
            await runner.candidate.resign()
            assert await next_leader(registry, "comes later") > last
        finally:
            await runner.close()
            await registry.close()
            transport.close()

    with one_etcd(tmp_path) as member:
        asyncio.run(asyncio.wait_for(body(member), DEADLINE_S))


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
