"""The leader's office over a registry in this process: rows that an operator was told of last."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import structlog

from xllm.errors import UnavailableError
from xllm.protocol.bus import RouterPresence
from xllm.protocol.records import leader_key, roles_key, slo_key
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.store import RegistryStore
from xllm.router.leadership import office
from xllm.router.leadership.objectives import ServiceObjectives
from xllm.router.leadership.office import MAX_AMENDMENTS, Office
from xllm.router.view import ClusterView

EPOCHS_BEFORE = 7000
"""Epochs are not revisions."""


class FakeCandidate:
    """Leads as long as it is told to."""

    def __init__(self) -> None:
        self.epoch = 0
        self.revision = 0

    def disproved(self, epoch: int) -> None:
        if self.epoch == epoch:
            self.epoch = 0


class GatedRegistry:
    """A registry of which reads and guarded writes wait until the gate is open."""

    def __init__(self) -> None:
        self.inner = LocalRegistry(RegistryStore())
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_mute = False
        """Reads of one key are not answered."""
        self.between: list[bytes] = []
        """What others write behind the next reads."""
        self.raced: dict[str, bytes] = {}
        """What others write just before the first comparison of a key."""

    async def list(self, prefix):
        await self.gate.wait()
        return await self.inner.list(prefix)

    async def get(self, key):
        if self.is_mute:
            await asyncio.Event().wait()
        entry = await self.inner.get(key)
        for between in self.between[:1]:
            self.between.remove(between)
            await self.inner.put(key, between)
        return entry

    async def compare_and_set(self, *arguments):
        if raced := self.raced.pop(arguments[0], None):
            await self.inner.put(arguments[0], raced)
        return await self.inner.compare_and_set(*arguments)

    async def write_guarded(self, *arguments):
        await self.gate.wait()
        return await self.inner.write_guarded(*arguments)


class Bench:
    """An office, its registry and its tasks."""

    def __init__(self) -> None:
        self.registry = GatedRegistry()
        self.candidate = FakeCandidate()
        self.tasks = []
        self.view = ClusterView(0.2)
        self.office = Office(
            self.registry,
            "c",
            self.candidate,
            self.view,
            lambda instance, message: True,
            lambda work: self.tasks.append(asyncio.ensure_future(work)),
        )
        self.now = 0.0

    async def elected(self) -> None:
        entry = await self.registry.inner.compare_and_set(leader_key("c"), 0, b"me")
        self.candidate.revision = entry.entry.create_revision
        self.candidate.epoch = EPOCHS_BEFORE + self.candidate.revision

    async def turn(self) -> None:
        """A heartbeat, and what it began."""
        self.now += 0.2
        self.office.tick(self.now)
        for _ in range(20):
            await asyncio.sleep(0)

    async def table(self) -> dict[str, str]:
        entry = await self.registry.inner.get(roles_key("c"))
        return msgspec.json.decode(entry.value) if entry is not None else {}


def on_bench(test) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            await asyncio.wait_for(test(bench), 20)
        finally:
            bench.registry.gate.set()
            for task in bench.tasks:
                task.cancel()
            await asyncio.gather(*bench.tasks, return_exceptions=True)
            await bench.registry.inner.close()

    asyncio.run(main())


def test_a_row_is_told_done_once_the_registry_has_it():
    async def body(b):
        with pytest.raises(UnavailableError, match="any more"):
            await b.office.assign("a", "prefill", b.now)
        await b.elected()
        await b.turn()
        b.registry.gate.clear()
        asked = asyncio.ensure_future(b.office.assign("a", "prefill", b.now))
        await b.turn()
        assert not asked.done()
        b.registry.gate.set()
        await asked
        assert await b.table() == {"a": "prefill"}

    on_bench(body)


def test_an_operator_waits_until_the_old_table_was_read(monkeypatch):
    async def body(b):
        with pytest.raises(UnavailableError, match="any more"):
            await b.office.wait_read()
        await b.registry.inner.put(roles_key("c"), b'{"z": "decode"}')
        await b.elected()
        b.registry.gate.clear()
        await b.turn()
        with pytest.raises(UnavailableError, match="any more"):
            await b.office.assign("a", "prefill", b.now)
        asked = asyncio.ensure_future(b.office.wait_read())
        await b.turn()
        assert not asked.done()
        with monkeypatch.context() as patch:
            patch.setattr(office, "ASSIGN_S", 0.01)
            with pytest.raises(UnavailableError, match="only just"):
                await b.office.wait_read()
        b.registry.gate.set()
        await b.turn()
        await asked
        await b.office.assign("a", "prefill", b.now)
        assert await b.table() == {"a": "prefill", "z": "decode"}

    on_bench(body)


def test_a_leader_that_was_replaced_says_so():
    async def body(b):
        await b.elected()
        await b.turn()
        b.registry.gate.clear()
        asked = asyncio.ensure_future(b.office.assign("a", "prefill", b.now))
        await b.turn()
        await b.registry.inner.delete(leader_key("c"))
        b.registry.gate.set()
        with pytest.raises(UnavailableError, match="any more"):
            await asked
        assert await b.table() == {}

    on_bench(body)


def test_a_registry_that_does_not_answer_an_amendment_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(office, "ASSIGN_S", 0.01)

    async def body(b):
        await b.elected()
        b.registry.is_mute = True
        with pytest.raises(UnavailableError, match="not taken the change"):
            await b.office.amend("k", lambda value: b"x")
        b.registry.is_mute = False
        assert await b.registry.inner.get("k") is None

    on_bench(body)


def test_nothing_is_lost_that_others_write_between_reading_and_writing():
    async def body(b):
        await b.elected()
        assert await b.office.amend("k", lambda value: value) is None
        assert await b.registry.inner.get("k") is None
        b.registry.between = [b"x", b"y"]
        assert await b.office.amend("k", lambda value: (value or b"") + b"!") == b"y!"
        assert (await b.registry.inner.get("k")).value == b"y!"
        assert await b.office.amend("k", lambda value: value) == b"y!"
        assert (await b.registry.inner.get("k")).value == b"y!"
        b.registry.between = [b"%d" % number for number in range(100)]
        with pytest.raises(UnavailableError, match="others write k"):
            await b.office.amend("k", lambda value: b"mine")
        assert (await b.registry.inner.get("k")).value == b"%d" % (MAX_AMENDMENTS - 1)

    on_bench(body)


def test_who_leads_no_more_amends_nothing():
    async def body(b):
        with pytest.raises(UnavailableError, match="any more"):
            await b.office.amend("k", lambda value: b"mine")
        assert await b.registry.inner.get("k") is None

    on_bench(body)


FORGOTTEN = 1000
"""The first revision of a registry that knows nothing any more."""


async def with_a_row_and_objectives(b) -> None:
    """What an operator wrote is in the registry and in what the leader remembers."""
    await b.elected()
    await b.turn()
    await b.office.assign("a", "decode", b.now)
    value = await b.office.amend(slo_key("c"), lambda before: b'{"ttft_ms":300,"tpot_ms":0}')
    b.office.objectives_changed(ServiceObjectives(300, 0))  # as the watch tells
    await b.turn()
    assert value is not None
    assert b.view.standing.remembered.roles == (("a", "decode"),)


async def elected_again(b, registry) -> None:
    """Another term, of this router or another one, in that registry."""
    b.registry.inner = registry
    b.candidate.epoch = 0
    await b.turn()
    await registry.delete(leader_key("c"))
    await b.elected()
    for _ in range(8):
        await b.turn()


async def slo(b) -> bytes | None:
    entry = await b.registry.inner.get(slo_key("c"))
    return None if entry is None else entry.value


def test_a_registry_that_lost_its_data_is_given_back_what_operators_wrote():
    async def body(b):
        await with_a_row_and_objectives(b)
        lost = b.registry.inner
        b.office.objectives_changed(None)  # before the leader knows that it leads no more
        with structlog.testing.capture_logs() as logs:
            await elected_again(b, LocalRegistry(RegistryStore(first_revision=FORGOTTEN)))
        await lost.close()
        found = [log for log in logs if log["event"] == "registry_data_lost"]
        assert [(log["num_roles"], log["num_left_out"]) for log in found] == [(1, 0)]
        assert await b.table() == {"a": "decode"}
        assert await slo(b) == b'{"ttft_ms":300,"tpot_ms":0}'

    on_bench(body)


def test_what_an_operator_wrote_since_the_loss_stays():
    async def body(b):
        await with_a_row_and_objectives(b)
        await b.office.assign("z", "prefill", b.now)
        await b.turn()
        lost, emptied = b.registry.inner, LocalRegistry(RegistryStore(first_revision=FORGOTTEN))
        await emptied.put(slo_key("c"), b'{"ttft_ms":900,"tpot_ms":0}')
        await emptied.put(roles_key("c"), b'{"a":"both","n":"decode"}')
        await elected_again(b, emptied)
        await lost.close()
        assert await slo(b) == b'{"ttft_ms":900,"tpot_ms":0}'
        assert await b.table() == {"n": "decode", "z": "prefill"}
        assert ("a", "both") not in b.view.standing.remembered.roles
        assert b.view.standing.remembered.ttft_ms == 900

    on_bench(body)


def test_what_is_written_while_lost_rows_are_written_back_stays():
    async def body(b):
        await with_a_row_and_objectives(b)
        lost, emptied = b.registry.inner, LocalRegistry(RegistryStore(first_revision=FORGOTTEN))
        b.registry.raced = {
            roles_key("c"): b'{"a":"prefill","n":"decode"}',
            slo_key("c"): b'{"ttft_ms":1,"tpot_ms":2}',
        }
        await elected_again(b, emptied)
        await lost.close()
        assert not b.registry.raced
        assert await b.table() == {"a": "prefill", "n": "decode"}
        assert await slo(b) == b'{"ttft_ms":1,"tpot_ms":2}'

    on_bench(body)


def test_a_later_leader_knows_from_the_bus_what_a_registry_lost():
    async def body(b):
        other = Bench()
        await with_a_row_and_objectives(other)
        known = other.view.standing.remembered
        await other.registry.inner.close()
        for task in other.tasks:
            await task
        word = RouterPresence("r", "1", 1, (), 5, known.roles)
        era = {"era": known.era, "ttft_ms": known.ttft_ms, "tpot_ms": known.tpot_ms}
        assert b.view.standing.heard(msgspec.structs.replace(word, **era))
        assert b.view.standing.heard(word)  # of a leader that has not read the registry yet
        assert b.view.standing.remembered == known
        await elected_again(b, b.registry.inner)
        assert await b.table() == {"a": "decode"}
        assert await slo(b) == b'{"ttft_ms":300,"tpot_ms":0}'

    on_bench(body)


def test_what_an_operator_deleted_stays_deleted():
    async def body(b):
        await with_a_row_and_objectives(b)
        await b.registry.inner.delete(slo_key("c"))
        b.office.objectives_changed(None)
        await b.registry.inner.delete(roles_key("c"))
        await b.turn()
        await b.turn()
        assert b.view.standing.remembered.ttft_ms == 0
        await elected_again(b, b.registry.inner)
        assert await b.table() == {}
        assert await slo(b) is None
        await elected_again(b, LocalRegistry(RegistryStore(first_revision=FORGOTTEN)))
        assert await slo(b) is None  # nor does it come back with what is lost later

    on_bench(body)
