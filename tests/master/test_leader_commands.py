"""Commands under epochs that no later leader could exceed: the registry's word decides."""

from __future__ import annotations

import asyncio
import dataclasses
import types

import pytest
import structlog

from tests.master.test_master_actor import Stage, make_settings
from xllm.errors import BrokenError
from xllm.master import leader_commands
from xllm.master.leader_commands import LeaderCommands
from xllm.protocol.codec import encode
from xllm.protocol.epochs import MAX_BASE
from xllm.protocol.instance import AssignRole, DrainInstance, EpochRefused
from xllm.protocol.records import LeaderRecord, leader_key
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.open import open_registry

ONE, OTHER = b"one", b"other"


class FakeMaster:
    """Knows who leads as `epoch` says, or does not; counts how often it was asked."""

    def __init__(self) -> None:
        self.epoch: int | None = 0
        self.num_asked = 0
        self.num_drains = 0
        self.metrics = types.SimpleNamespace(num_stale_commands=0, num_epochs_out_of_range=0)
        self.registration = self
        self.answers: list[EpochRefused] = []
        self.commands = LeaderCommands(
            self, lambda _, message: self.answers.append(message), bytes.decode
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def leader_epoch(self) -> int:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.epoch is None:
            raise BrokenError("nobody there")
        return self.epoch

    def spawn(self, coroutine) -> None:
        self._tasks.append(asyncio.ensure_future(coroutine))

    def beat(self) -> None:
        pass

    def begin_drain(self) -> None:
        self.num_drains += 1

    async def drain(self, timeout_s: float) -> int:
        return 0

    async def say(self, *said: AssignRole | DrainInstance, router: bytes = ONE) -> str:
        """Commands of a connection; returns the role that the instance has then."""
        for message in said:
            self.commands.command(router, message)
        await self.settled()
        return self.commands.role

    async def settled(self) -> None:
        await asyncio.gather(*self._tasks)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(leader_commands, "LOOK_UP_S", 0.001)


def run(scenario) -> None:
    async def body() -> None:
        await scenario(FakeMaster())

    asyncio.run(asyncio.wait_for(body(), 20))


def test_up_to_the_highest_base_a_word_is_enough():
    async def scenario(master: FakeMaster) -> None:
        assert await master.say(AssignRole("prefill", 5)) == "prefill"
        assert await master.say(AssignRole("decode", MAX_BASE)) == "decode"
        assert await master.say(AssignRole("both", 5)) == "decode"
        assert master.answers == [EpochRefused(5, MAX_BASE)]
        assert master.num_asked == 0

    run(scenario)


@pytest.mark.parametrize("named", [0, 7, None])
def test_a_higher_epoch_that_the_registry_does_not_name_shuts_out_no_leader(often, named):
    async def scenario(master: FakeMaster) -> None:
        master.epoch = named
        for epoch in (MAX_BASE + 1, 2**64 - 1):
            with structlog.testing.capture_logs() as logs:
                assert await master.say(AssignRole("decode", epoch)) == "both"
                await master.say(DrainInstance(0, epoch))
            said = [(log["of"], log["epoch"]) for log in logs if "of" in log]
            assert said == ([("one", epoch)] if epoch == MAX_BASE + 1 else []), "said once"
        assert master.num_drains == 0
        assert master.metrics.num_epochs_out_of_range == 4
        assert master.answers == []
        assert await master.say(AssignRole("prefill", 7), router=OTHER) == "prefill"

    run(scenario)


def test_a_higher_epoch_that_the_registry_names_is_believed(often):
    async def scenario(master: FakeMaster) -> None:
        master.epoch = MAX_BASE + 50
        assert await master.say(AssignRole("decode", MAX_BASE + 51)) == "both"
        assert await master.say(AssignRole("decode", MAX_BASE + 50)) == "decode"
        assert master.num_asked == 1
        assert await master.say(AssignRole("both", MAX_BASE + 49)) == "decode"
        assert await master.say(AssignRole("both", 7)) == "decode"
        lower = [EpochRefused(epoch, MAX_BASE + 50) for epoch in (MAX_BASE + 49, 7)]
        assert master.answers == lower
        master.epoch = MAX_BASE + 60
        assert await master.say(DrainInstance(0, MAX_BASE + 60)) == "decode"
        assert master.num_drains == 1
        master.epoch = MAX_BASE + 70
        both = DrainInstance(0, MAX_BASE + 70), AssignRole("both", MAX_BASE + 70)
        assert await master.say(*both) == "both"
        assert master.num_drains == 2, "a role does not replace a drain"

    run(scenario)


def test_commands_of_several_connections_share_a_question(often):
    async def scenario(master: FakeMaster) -> None:
        master.epoch = MAX_BASE + 50
        for epoch in range(MAX_BASE + 100, MAX_BASE + 200):
            master.commands.command(OTHER, AssignRole("decode", epoch))
        assert await master.say(AssignRole("prefill", MAX_BASE + 50)) == "prefill"
        assert master.num_asked == 1
        assert master.metrics.num_epochs_out_of_range == 1, "the last of a connection counts"

    run(scenario)


def test_the_registry_is_asked_once_a_period(monkeypatch):
    async def scenario(master: FakeMaster) -> None:
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def pause(seconds: float) -> None:
            pauses.append(seconds)
            await sleep(0)

        monkeypatch.setattr(leader_commands.asyncio, "sleep", pause)
        for _ in range(2):
            await master.say(AssignRole("decode", MAX_BASE + 1))
        asked = [seconds for seconds in pauses if seconds]
        assert asked[0] <= 0
        assert 0.5 < asked[1] <= leader_commands.LOOK_UP_S

    run(scenario)


def test_a_connection_that_went_meanwhile_is_forgotten(often):
    async def scenario(master: FakeMaster) -> None:
        master.epoch = MAX_BASE + 50
        master.commands.command(ONE, AssignRole("decode", MAX_BASE + 50))
        master.commands.gone(ONE)
        await master.settled()
        assert master.commands.role == "both"
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                await master.say(AssignRole("decode", MAX_BASE + 51))
                master.commands.gone(ONE)
        assert [log["event"] for log in logs] == ["epoch_out_of_range"] * 2

    run(scenario)


def test_an_instance_looks_the_leader_up_in_its_registry(run_dir, often):
    async def scenario() -> None:
        settings = make_settings(run_dir)
        cluster = dataclasses.replace(settings.cluster, registry=f"ipc://{run_dir}/registry")
        one = Stage(dataclasses.replace(settings, cluster=cluster))
        server = EmbeddedRegistryServer(one.transport, cluster.registry)
        registry = open_registry(cluster.registry, one.transport)
        await one.start()
        try:
            key = leader_key("default")
            record = LeaderRecord("r", "1", epoch_base=MAX_BASE)
            revision = await registry.put(key, encode(record))
            one.router.send(AssignRole("decode", 2**64 - 1))
            one.router.send(AssignRole("prefill", MAX_BASE + revision))
            await one.router.until(
                lambda: one.router.beats and one.router.beats[-1].role == "prefill"
            )
            one.router.send(AssignRole("both", 9))
            assert (await one.router.answer(EpochRefused)).highest == MAX_BASE + revision
        finally:
            await one.close()
            await registry.close()
            await server.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
