"""Leadership of routers that hear each other, over one registry in this process."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable

import msgspec
import pytest
import structlog
from prometheus_client import CollectorRegistry

from xllm.config.cluster import ClusterSettings
from xllm.errors import BrokenError, UnavailableError
from xllm.protocol.administration import ObjectivesSet, SetObjectives, SetRole
from xllm.protocol.bus import RouterPresence
from xllm.protocol.codec import encode
from xllm.protocol.epochs import MAX_BASE
from xllm.protocol.instance import AssignRole, EpochRefused
from xllm.protocol.records import (
    InstanceRecord,
    LeaderRecord,
    epoch_base_key,
    leader_key,
    roles_key,
    slo_key,
)
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.registry_wire import Entry
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
        self.is_cut_off = False
        self.answers: dict[type, Callable[[str, EpochRefused], None]] = {}
        membership = types.SimpleNamespace(
            listeners=[], answers=self.answers.__setitem__, send=self._send
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

    def _send(self, instance: str, message: AssignRole) -> bool:
        if self.is_cut_off:
            raise BrokenError("no socket")
        return True

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


def scenario(body, *names: str) -> None:
    """Routers of these names over one empty registry, until `body(registry, *routers)` is done."""

    async def main() -> None:
        registry = LocalRegistry(RegistryStore())
        routers = [Router(name, registry) for name in names]
        try:
            await body(registry, *routers)
        finally:
            for one in routers:
                await one.close()
            await registry.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


@pytest.mark.parametrize("epoch", [MAX_BASE + 1, 2**64 - 1])
def test_an_epoch_that_none_can_exceed_is_ignored_counted_and_named(epoch):
    async def body(registry: LocalRegistry, one: Router) -> None:
        await one.leadership.start()
        await beat([one], lambda: one.view.standing.remembered.era)
        led, standing = one.leadership.epoch, one.view.standing
        with structlog.testing.capture_logs() as logs:
            one.hear(RouterPresence("peer", "1", 1, highest_epoch=epoch))
            one.hear(RouterPresence("peer", "1", 2, leader_epoch=epoch))
            one.hear(RouterPresence("peer", "1", 3, leader_epoch=epoch))
            one.answers[EpochRefused]("i", EpochRefused(led, epoch))
        assert standing.num_out_of_range == 4
        named = [(log["of"], log["field"]) for log in logs if log["event"] == "epoch_out_of_range"]
        fields = [("peer", "highest_epoch"), ("peer", "leader_epoch")]
        assert named == [*fields, ("i", "EpochRefused.highest")]
        assert (one.leadership.epoch, standing.epoch, standing.leader) == (led, led, "one")
        encode(one.word())
        assert await registry.get(epoch_base_key("default")) is None

    scenario(body, "one")


def test_the_highest_epoch_that_is_believed_has_leaders_after_it():
    async def body(registry: LocalRegistry, one: Router, two: Router) -> None:
        for router in (one, two):
            await router.leadership.start()
        await beat([one, two], lambda: two.view.standing.remembered.era)
        for router in (one, two):
            router.hear(RouterPresence("peer", "1", 1, highest_epoch=MAX_BASE))
        epoch = 0
        for spoiled in range(3):
            last = epoch

            def agree(last: int = last) -> bool:
                seen = {
                    (router.view.standing.leader, router.view.standing.epoch)
                    for router in (one, two)
                }
                leads = one.leadership.epoch or two.leadership.epoch
                return leads > max(last, MAX_BASE) and {now for _, now in seen} == {leads}

            await beat([one, two], agree)
            epoch = one.leadership.epoch or two.leadership.epoch
            assert (await registry.get(epoch_base_key("default"))).value == b"%d" % MAX_BASE
            encode((one if one.leadership.epoch else two).word())
            for router in (one, two):
                router.hear(RouterPresence("peer", "1", 2 + spoiled, highest_epoch=epoch + 1))
            assert epoch == (one.leadership.epoch or two.leadership.epoch)
            await registry.revoke((await registry.get(leader_key("default"))).lease_id)

    scenario(body, "one", "two")


@pytest.mark.parametrize("base", [-1, MAX_BASE + 1, 2**64 - 1])
def test_a_leader_key_with_a_base_out_of_range_names_nobody(base):
    async def body(registry: LocalRegistry, one: Router) -> None:
        record = LeaderRecord("x", "1", "tcp://x", epoch_base=base)
        await registry.put(leader_key("default"), encode(record))
        with structlog.testing.capture_logs() as logs:
            await one.leadership.start()
            await beat([one], lambda: logs)
        assert [(log["event"], "epoch_base" in log["error"]) for log in logs] == [
            ("bad_record", True)
        ]
        assert (one.view.standing.leader, one.view.standing.epoch) == ("", 0)

    scenario(body, "one")


def test_a_leader_that_started_behind_a_loss_gives_way_to_those_that_remember():
    async def body(registry: LocalRegistry, new: Router, old: Router) -> None:
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

    scenario(body, "new", "old")


def test_a_claim_is_not_outbid_by_its_own_key():
    async def body(registry: LocalRegistry, one: Router, two: Router) -> None:
        base_key, read = epoch_base_key("default"), registry.get
        claimed: list[int] = []

        async def slow(key: str) -> Entry | None:
            """The base is read behind a claim once all have heard of the claim's epoch."""
            key_entry = await read(leader_key("default"))
            if key == base_key and key_entry is not None:
                claimed.append(key_entry.create_revision)
                while one.view.standing.epoch != key_entry.create_revision:
                    await asyncio.sleep(BEAT_S)
                await asyncio.sleep(3 * BEAT_S)  # each beats, and hears what the other says
            return await read(key)

        await two.leadership.start()
        await beat([one, two], lambda: two.leadership.epoch)
        registry.get = slow
        await one.leadership.start()
        led = two.leadership.epoch
        await registry.revoke((await read(leader_key("default"))).lease_id)
        await beat([one, two], lambda: (one.leadership.epoch or two.leadership.epoch) > led)
        assert set(claimed) == {one.leadership.epoch or two.leadership.epoch}, "the first claim's"
        assert await read(base_key) is None

    scenario(body, "one", "two")


def test_two_that_lead_under_one_epoch_both_lead_no_more():
    """As beside a registry that lost its data and gives revisions out again."""

    async def body(registry: LocalRegistry, one: Router) -> None:
        await one.leadership.start()
        await beat([one], lambda: one.leadership.epoch)
        led = one.leadership.epoch
        for said, leads in ((0, led), (led - 1, led), (1 << 63, led), (led, 0)):
            one.leadership.heard(RouterPresence("two", "i", 1, leader_epoch=said))
            assert one.leadership.epoch == leads
        await beat([one], lambda: one.leadership.epoch > led)

    scenario(body, "one")


def test_above_the_bound_no_word_unseats_a_leader():
    """What nobody could exceed is believed of the registry alone."""

    async def body(registry: LocalRegistry, one: Router) -> None:
        one.view.standing.learned(MAX_BASE)
        await one.leadership.start()
        await beat([one], lambda: one.leadership.epoch)
        led = one.leadership.epoch
        assert led > MAX_BASE
        one.leadership.heard(RouterPresence("two", "i", 1, leader_epoch=led))
        assert one.leadership.epoch == led

    scenario(body, "one")


def test_what_is_in_force_is_told_by_a_leader_whose_registry_is_silent():
    async def body(registry: LocalRegistry, one: Router) -> None:
        async def silence(key: str) -> None:
            await asyncio.Event().wait()

        await one.leadership.start()
        await beat([one], lambda: one.leadership.epoch)
        registry.get = silence
        question = SetObjectives(id=7, ttft_ms=None, tpot_ms=None)
        answer = await asyncio.wait_for(one.leadership.command(question), 1.0)
        assert answer == ObjectivesSet(id=7, ttft_ms=0, tpot_ms=0)

    scenario(body, "one")


def test_only_a_failing_registry_is_called_one():
    async def body(registry: LocalRegistry, one: Router) -> None:
        async def fail(key: str) -> None:
            raise BrokenError("nobody there")

        await one.leadership.start()
        await beat([one], lambda: one.view.standing.remembered.era)
        registry.get = fail
        with pytest.raises(UnavailableError, match="the registry does not answer: nobody there"):
            await one.leadership.command(SetObjectives(id=1, ttft_ms=5))
        one.view.registered(
            InstanceRecord("i", "1", "tcp://i", "tcp://b", "m", "/m", 99, 99, 16, 9), 0.0
        )
        one.view.connected("i")
        one.is_cut_off = True
        with pytest.raises(BrokenError, match="no socket"):
            await one.leadership.command(SetRole(id=2, instance="i", role="decode"))

    scenario(body, "one")
