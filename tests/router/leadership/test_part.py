"""Leadership of routers that hear each other, over one registry in this process."""

from __future__ import annotations

import asyncio
import types

import msgspec
from prometheus_client import CollectorRegistry

from xllm.config.cluster import ClusterSettings
from xllm.protocol.bus import RouterPresence
from xllm.protocol.records import LeaderRecord, roles_key, slo_key
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.router.leadership.objectives import LiveObjectives
from xllm.router.leadership.part import Leadership
from xllm.router.leadership.standing import Remembered
from xllm.router.view import ClusterView

BEAT_S = 0.02
DEADLINE_S = 30.0
BEFORE = 7000
"""The epoch of a leader that was there before the registry lost its data."""


class Router:
    """What of a router leadership knows."""

    def __init__(self, name: str, registry: LocalRegistry) -> None:
        self.name = name
        self.seq = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.view = ClusterView(BEAT_S)
        membership = types.SimpleNamespace(
            listeners=[], answers=lambda kind, take: None, send=lambda instance, message: True
        )
        service = types.SimpleNamespace(
            view=self.view,
            registry=CollectorRegistry(),
            complaints=[],
            leader_command=None,
            objectives=LiveObjectives(),
        )
        self.leadership = Leadership(
            LeaderRecord(name, "1", f"tcp://{name}"),
            ClusterSettings(lease_s=2.0),
            registry,
            membership,
            service,
            lambda work: self.tasks.append(asyncio.ensure_future(work)),
        )

    def word(self) -> RouterPresence:
        self.seq += 1
        self.leadership.tick()
        return self.leadership.say(RouterPresence(self.name, "1", self.seq))

    def hear(self, word: RouterPresence) -> None:
        self.view.standing.heard(word)
        self.leadership.heard(word)

    async def close(self) -> None:
        self.leadership.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def beat(routers, condition) -> None:
    """Heartbeats, until it holds."""
    while not condition():
        for one in routers:
            word = one.word()
            for other in routers:
                if other is not one:
                    other.hear(word)
        await asyncio.sleep(BEAT_S)


def test_a_leader_that_started_behind_a_loss_gives_way_to_those_that_remember():
    async def body() -> None:
        registry = LocalRegistry(RegistryStore())
        new, old = Router("new", registry), Router("old", registry)
        try:
            await new.leadership.start()
            await beat([new], lambda: new.view.standing.remembered.era)
            assert 0 < new.leadership.epoch < BEFORE
            old.view.standing.learned(BEFORE)
            old.view.standing.remembered = Remembered("before", (("i", "decode"),), 300, 20)
            await old.leadership.start()
            await beat([new, old], lambda: new.view.standing.remembered.roles)
            assert old.leadership.epoch > BEFORE
            assert new.leadership.epoch == 0
            for one in (new, old):
                standing = one.view.standing
                assert (standing.leader, standing.epoch) == ("old", old.leadership.epoch)
                assert standing.remembered.roles == (("i", "decode"),)
            table = (await registry.get(roles_key("default"))).value
            assert msgspec.json.decode(table) == {"i": "decode"}
            assert (await registry.get(slo_key("default"))).value == b'{"ttft_ms":300,"tpot_ms":20}'
        finally:
            for one in (new, old):
                await one.close()
            await registry.close()

    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))
