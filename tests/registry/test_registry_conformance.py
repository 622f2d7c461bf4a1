"""What every registry must do, run against each implementation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from xllm.errors import ClosedError, FencedError, InvalidRequestError
from xllm.protocol.codec import encode
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.holder import Holder
from xllm.protocol.registry.interface import MAX_GUARDED_WRITES, MAX_VALUE_BYTES
from xllm.protocol.registry.keeper import Registration
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.registry.open import open_registry
from xllm.protocol.registry.store import RegistryStore
from xllm.protocol.transport.context import Transport

DEADLINE_S = 10.0


@contextlib.asynccontextmanager
async def opened(kind, tmp_path, address):
    """Two registries that are the same one, as two processes would see it."""
    if kind == "local":
        registry = LocalRegistry(RegistryStore())
        yield registry, registry
        await registry.close()
        return
    transport = Transport()
    if kind == "etcd":
        one, two = open_registry(address, transport), open_registry(address, transport)
        for entry in (await one.list("")).entries:  # of the test before
            await one.delete(entry.key)
        try:
            yield one, two
        finally:
            await one.close()
            await two.close()
            transport.close()
        return
    endpoint = "inproc://registry" if kind == "inproc" else f"ipc://{tmp_path}/registry"
    server = EmbeddedRegistryServer(transport, endpoint)
    one = open_registry(server.endpoint, transport)
    two = open_registry(server.endpoint, transport)
    try:
        yield one, two
    finally:
        await one.close()
        await two.close()
        await server.close()
        transport.close()


@pytest.fixture(params=["local", "inproc", "ipc", pytest.param("etcd", marks=pytest.mark.etcd)])
def run(request, tmp_path):
    """Runs a test's coroutine function with two views of one registry."""
    address = request.getfixturevalue("etcd").address if request.param == "etcd" else ""

    def runner(test):
        async def main():
            async with asyncio.timeout(DEADLINE_S):
                async with opened(request.param, tmp_path, address) as views:
                    await test(*views)

        asyncio.run(main())

    return runner


class Seen:
    """Collects changes; `until` waits for a number of them."""

    def __init__(self):
        self.changes = []
        self._news = asyncio.Event()

    def __call__(self, changes):
        self.changes.extend(changes)
        self._news.set()

    async def until(self, count):
        while len(self.changes) < count:
            self._news.clear()
            await self._news.wait()
        return self.changes

    def summary(self):
        return [(c.key, c.entry.value if c.entry else None) for c in self.changes]


def test_put_get_list_delete(run):
    async def check(one, two):
        assert await one.get("/a/1") is None
        first = await one.put("/a/1", b"x")
        second = await two.put("/a/2", b"y")
        assert second > first
        entry = await two.get("/a/1")
        assert (entry.value, entry.create_revision, entry.mod_revision) == (b"x", first, first)
        await one.put("/b", b"z")
        listing = await two.list("/a/")
        assert [e.key for e in listing.entries] == ["/a/1", "/a/2"]
        assert listing.revision > second
        assert await one.delete("/a/1")
        assert not await one.delete("/a/1")
        assert await two.get("/a/1") is None

    run(check)


def test_compare_and_set_elects_one(run):
    async def check(one, two):
        results = await asyncio.gather(
            *(r.compare_and_set("/leader", 0, str(n).encode()) for n, r in enumerate([one, two]))
        )
        assert sorted(r.ok for r in results) == [False, True]
        winner = next(r for r in results if r.ok)
        loser = next(r for r in results if not r.ok)
        assert loser.entry == winner.entry == await one.get("/leader")
        changed = await two.compare_and_set("/leader", winner.entry.mod_revision, b"new")
        assert changed.ok
        assert changed.entry.create_revision == winner.entry.create_revision

    run(check)


def test_one_of_two_that_claim_a_name_at_once_has_it(run):
    async def check(one, two):
        claims = []
        for registry, incarnation in ((one, "1"), (two, "2")):
            value = encode(Holder(incarnation=incarnation))
            claims.append(
                Registration(registry, "/me", lambda v=value: v, 60.0, incarnation=incarnation)
            )
        for _ in range(5):
            had = await asyncio.gather(*(claim.attempt() for claim in claims))
            assert sorted(had) == [False, True]
            winner, loser = (claims[had.index(one_has_it)] for one_has_it in (True, False))
            assert loser.lease_id == 0
            assert not await loser.is_free()
            assert (await two.get("/me")).lease_id == winner.lease_id
            await winner.refresh()  # its own name: at once
            assert (await two.get("/me")).lease_id == winner.lease_id
            await winner.withdraw()
            assert await loser.is_free()

    run(check)


def test_a_guarded_write_is_one_change_or_none(run):
    async def check(one, two):
        lease = await one.grant(60)
        claim = await one.compare_and_set("/leader", 0, b"one", lease.id)
        epoch = claim.entry.create_revision
        await one.put("/m/old", b"x")
        seen = Seen()
        await two.watch("/m/", seen, after=await two.list("/m/"))
        puts, deletes = [("/m/1", b"a"), ("/m/2", b"b")], ["/m/old", "/m/never"]
        assert await one.write_guarded("/leader", epoch, puts, deletes)
        await seen.until(3)
        assert sorted(seen.summary(), key=str) == [
            ("/m/1", b"a"),
            ("/m/2", b"b"),
            ("/m/old", None),
        ]
        assert len({change.revision for change in seen.changes}) == 1
        assert (await two.get("/m/1")).lease_id == 0
        await one.put("/leader", b"still one", lease.id)  # written again is not created again
        assert await one.write_guarded("/leader", epoch, [("/m/1", b"c")])
        await one.revoke(lease.id)
        assert not await one.write_guarded("/leader", epoch, [("/m/1", b"late")], ["/m/2"])
        later = await two.compare_and_set("/leader", 0, b"two")
        assert later.entry.create_revision > epoch
        assert not await one.write_guarded("/leader", epoch, [("/m/1", b"late")])
        assert (await two.get("/m/1")).value == b"c"
        assert (await two.get("/m/2")).value == b"b"
        assert await two.write_guarded("/leader", later.entry.create_revision)

    run(check)


def test_a_guarded_write_is_bounded(run):
    async def check(one, two):
        epoch = (await one.compare_and_set("/leader", 0, b"one")).entry.create_revision
        many = [(f"/m/{n}", b"x") for n in range(MAX_GUARDED_WRITES)]
        with pytest.raises(InvalidRequestError):
            await one.write_guarded("/leader", epoch, many, ["/m/more"])
        with pytest.raises(InvalidRequestError):
            await one.write_guarded("/leader", epoch, [("/m/1", b"x")], ["/m/1"])
        with pytest.raises(InvalidRequestError):
            await one.write_guarded("/leader", epoch, [("/m/1", bytes(MAX_VALUE_BYTES + 1))])
        assert (await two.list("/m/")).entries == ()
        assert await one.write_guarded("/leader", epoch, many)
        assert len((await two.list("/m/")).entries) == MAX_GUARDED_WRITES

    run(check)


def test_the_end_of_a_lease_deletes_its_keys(run):
    async def check(one, two):
        lease = await one.grant(2.5)
        assert lease.ttl_s >= 2.5
        await one.put("/a", b"x", lease.id)
        await one.put("/b", b"x")
        seen = Seen()
        await two.watch("/", seen, after=await two.list("/"))
        assert await one.keep_alive(lease.id) > 0
        await one.revoke(lease.id)
        await one.revoke(lease.id)
        await seen.until(1)
        assert seen.summary() == [("/a", None)]
        assert await one.keep_alive(lease.id) == 0
        with pytest.raises(FencedError):
            await one.put("/a", b"x", lease.id)

    run(check)


def test_a_lease_lapses_by_itself_and_watchers_hear_it(run):
    async def check(one, two):
        lease = await one.grant(2.0)
        await one.put("/a", b"x", lease.id)
        seen = Seen()
        await two.watch("/a", seen)
        await seen.until(2)
        assert seen.summary() == [("/a", b"x"), ("/a", None)]

    run(check)


def test_a_watch_tells_what_follows_a_listing(run):
    async def check(one, two):
        await one.put("/w/a", b"1")
        listing = await one.list("/w/")
        await one.put("/w/a", b"2")
        await one.put("/other", b"")
        seen = Seen()
        watch = await two.watch("/w/", seen, after=listing)
        await one.put("/w/b", b"3")
        await one.delete("/w/a")
        await seen.until(3)
        assert seen.summary() == [("/w/a", b"2"), ("/w/b", b"3"), ("/w/a", None)]
        revisions = [c.revision for c in seen.changes]
        assert revisions == sorted(set(revisions))
        watch.close()
        await one.put("/w/c", b"")
        fence = Seen()
        await two.watch("/w/", fence)
        await fence.until(2)
        assert len(seen.changes) == 3

    run(check)


def test_a_watch_without_a_listing_tells_what_is_there_first(run):
    async def check(one, two):
        await one.put("/w/b", b"1")
        await one.put("/w/a", b"2")
        seen = Seen()
        await two.watch("/w/", seen)
        assert seen.summary() == [("/w/b", b"1"), ("/w/a", b"2")]

    run(check)


def test_no_change_is_lost_or_told_twice_under_load(run):
    async def check(one, two):
        seen = Seen()

        async def write(registry, name):
            for number in range(100):
                await registry.put(f"/w/{name}{number % 7}", str(number).encode())

        writers = [asyncio.create_task(write(r, n)) for n, r in (("x", one), ("y", two))]
        await two.watch("/w/", seen)
        await asyncio.gather(*writers)
        await one.put("/w/end", b"")
        while not seen.changes or seen.changes[-1].key != "/w/end":
            await seen.until(len(seen.changes) + 1)
        state = {}
        for change in seen.changes:
            state[change.key] = change.entry
        assert list(state.values()) != []
        assert sorted(state) == [e.key for e in (await one.list("/w/")).entries]
        assert tuple(state[k] for k in sorted(state)) == (await one.list("/w/")).entries
        revisions = [c.revision for c in seen.changes]
        assert revisions == sorted(set(revisions))

    run(check)


def test_out_of_bounds_is_a_typed_error(run):
    async def check(one, two):
        with pytest.raises(InvalidRequestError):
            await one.put("", b"")
        with pytest.raises(InvalidRequestError):
            await one.put("/a", b"x" * 100_000)
        with pytest.raises(InvalidRequestError):
            await one.grant(-1.0)
        assert (await two.list("/")).entries == ()

    run(check)


def test_a_closed_registry_says_so(run):
    async def check(one, two):
        await one.close()
        with pytest.raises(ClosedError):
            await one.get("/a")

    run(check)
