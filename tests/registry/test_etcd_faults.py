"""The registry on a real etcd that is killed, frozen, cut off, compacted, wiped or full."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest

from tests.free_ports import free_ports
from tests.registry.etcd_server import one_etcd, wait_until
from tests.registry.tcp_proxy import TcpProxy
from tests.registry.watcher import Told, in_loop, run, until
from xllm.errors import BrokenError, ClosedError, OverloadedError
from xllm.protocol.registry import etcd_connection, etcd_watch
from xllm.protocol.registry.etcd import EtcdRegistry
from xllm.protocol.registry.etcd_address import parse_etcd_address
from xllm.protocol.registry.keeper import Registration

pytestmark = [pytest.mark.process, pytest.mark.etcd]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An etcd that tests may hurt, if they heal it."""
    with one_etcd(tmp_path_factory.mktemp("etcd"), "--auto-compaction-retention", "0") as member:
        yield member


@contextlib.asynccontextmanager
async def registries(*addresses, timeout_s=3.0):
    """A registry at each address."""
    opened = [EtcdRegistry(parse_etcd_address(one), timeout_s=timeout_s) for one in addresses]
    try:
        yield opened
    finally:
        for one in opened:
            await one.close()


@contextlib.asynccontextmanager
async def emptied(*addresses):
    """The same, with nothing in etcd."""
    async with registries(*addresses) as opened:
        for entry in (await opened[0].list("")).entries:
            await opened[0].delete(entry.key)
        yield opened


@contextlib.asynccontextmanager
async def parted(server, monkeypatch):
    """A registry at etcd, which is empty, another one behind a proxy, and the proxy."""
    monkeypatch.setattr(etcd_connection, "OUTAGE_GRACE_S", 0.2)
    proxy = TcpProxy(server.endpoint)
    endpoint = await proxy.start()
    async with emptied(server.address, f"etcd://{endpoint}") as (one, two):
        yield one, two, proxy
    await proxy.close()


async def answered(call, seconds=30.0):
    """What `call` gives once etcd answers."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                return await call()
            except BrokenError:
                await asyncio.sleep(0.05)


def num_threads():
    """Of this process, those of libraries too."""
    return len(os.listdir("/proc/self/task"))


@in_loop
async def test_a_watch_goes_on_after_a_restart(server):
    async with emptied(server.address, server.address) as (one, two):
        told = Told()
        await one.put("/w/stays", b"1")
        await one.put("/w/changes", b"1")
        await one.watch("/w/", told)
        server.kill()
        await until(lambda: one.degraded, "degraded")
        with pytest.raises(BrokenError, match="cannot be reached"):
            await two.put("/w/changes", b"lost")
        server.start()
        await answered(lambda: two.put("/w/changes", b"2"))
        await two.put("/w/new", b"1")
        await until(lambda: len(told.changes) >= 4, "news after the restart")
        assert told.values == {"/w/stays": b"1", "/w/changes": b"2", "/w/new": b"1"}
        assert told.deleted == []
        await until(lambda: not one.degraded, "no longer degraded")


@in_loop
async def test_a_frozen_etcd_shows_and_lapsed_leases_of_the_living_are_not_told(
    server, monkeypatch
):
    monkeypatch.setattr(etcd_connection, "OUTAGE_GRACE_S", 3.0)
    async with emptied(server.address, server.address) as (one, two):
        told = Told()
        alive = Registration(two, "/w/alive", lambda: b"alive", 2.0)
        assert await alive.attempt()
        dead = await one.grant(2.0)
        await one.put("/w/dead", b"dead", dead.id)
        await one.watch("/w/", told, patient=True)
        await one.watch("/w/alive", at_once := Told())
        first = told.entries["/w/alive"]
        server.freeze()
        began = time.monotonic()
        calls = [
            asyncio.create_task(call)
            for call in (one.get("/w/alive"), one.put("/x", b""), two.grant(5.0), one.list("/"))
        ]
        await until(lambda: one.degraded, "degraded", 4.5)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, BrokenError)
        assert time.monotonic() - began < 8.0
        await until(lambda: alive.degraded, "the owner's word of it")
        while time.monotonic() - began < 5.0:
            await asyncio.sleep(0.05)
        assert server.state() == "T"
        server.thaw()
        await until(lambda: told.entries["/w/alive"].lease_id != first.lease_id, "its return")
        await until(lambda: "/w/dead" not in told.entries, "the end of the dead")
        assert told.deleted == ["/w/dead"]
        assert at_once.deleted == ["/w/alive"]
        assert at_once.entries == {"/w/alive": told.entries["/w/alive"]}
        assert not one.degraded
        await alive.withdraw()


@pytest.mark.parametrize("how", ["cut", "blackhole"])
@in_loop
async def test_a_compaction_while_the_watch_was_cut_off(server, monkeypatch, how):
    async with parted(server, monkeypatch) as (one, two, proxy):
        for name in ("changes", "goes", "stays"):
            await one.put(f"/w/{name}", b"1")
        told = Told()
        watch = await two.watch("/w/", told)
        await one.put("/w/late", b"1")
        await until(lambda: "/w/late" in told.entries, "the watch")
        num_listings = watch.num_listings
        proxy.blackhole()
        if how == "cut":
            proxy.cut()
        await until(lambda: two.degraded, "degraded")
        await one.delete("/w/goes")
        await one.delete("/w/late")
        last = await one.put("/w/changes", b"2")
        await one.put("/w/late", b"again")
        server.ctl("compact", str(last))
        assert "/w/goes" in told.entries
        if how == "blackhole":
            assert proxy.num_swallowed
        proxy.heal()
        await until(lambda: "/w/goes" not in told.entries, "the difference")
        assert told.values == {"/w/changes": b"2", "/w/stays": b"1", "/w/late": b"again"}
        assert told.deleted == ["/w/goes"]
        assert watch.num_listings > num_listings
        await one.put("/w/after", b"1")
        await until(lambda: "/w/after" in told.entries, "the watch after it")


@in_loop
async def test_a_partition_without_compaction_is_resumed_without_a_listing(server, monkeypatch):
    async with parted(server, monkeypatch) as (one, two, proxy):
        told = Told()
        watch = await two.watch("/w/", told)
        proxy.blackhole()
        await until(lambda: two.degraded, "degraded")
        for number in range(5):
            await one.put("/w/a", str(number).encode())
        proxy.heal()
        await until(lambda: len(told.changes) == 5, "every change")
        assert [one.entry.value for one in told.changes] == [b"0", b"1", b"2", b"3", b"4"]
        assert watch.num_listings == 1


@in_loop
async def test_a_lease_that_somebody_revoked_is_replaced(server):
    async with emptied(server.address) as (one,):
        told = Told()
        registration = Registration(one, "/w/me", lambda: b"me", 5.0)
        assert await registration.attempt()
        await one.watch("/w/", told)
        first = registration.lease_id
        server.ctl("lease", "revoke", f"{first:x}")
        await until(lambda: told.deleted == ["/w/me"], "the revocation")
        await until(lambda: "/w/me" in told.entries, "the return")
        await until(lambda: registration.num_registrations == 2, "the answer")
        assert told.entries["/w/me"].lease_id == registration.lease_id != first
        await registration.withdraw()


@in_loop
async def test_an_etcd_that_lost_everything(server, monkeypatch):
    monkeypatch.setattr(etcd_connection, "OUTAGE_GRACE_S", 3.0)
    async with emptied(server.address) as (one,):
        registration = Registration(one, "/w/lives", lambda: b"x", 2.0)
        assert await registration.attempt()
        await one.put("/w/forgotten", b"x")
        told = Told()
        await one.watch("/w/", told, patient=True)
        revision = server.revision()
        server.empty()
        await until(lambda: registration.num_registrations == 2, "the return of the owner")
        assert server.revision() < revision
        await until(lambda: "/w/forgotten" not in told.entries, "the end of the forgotten")
        assert told.deleted == ["/w/forgotten"]
        assert told.values == {"/w/lives": b"x"}
        await one.put("/w/new", b"1")
        await until(lambda: "/w/new" in told.entries, "the watch after it")
        await registration.withdraw()


@in_loop
async def test_an_etcd_that_lost_everything_and_has_come_as_far_again(server, monkeypatch):
    async with parted(server, monkeypatch) as (one, two, proxy):
        for _ in range(20):  # so that what is written first now was long ago then
            await one.put("/x", b"")
        last = await one.put("/w/forgotten", b"x")
        told, none_there = Told(), Told()
        await two.watch("/w/", told)
        await two.watch("/empty/", none_there)
        proxy.blackhole()
        proxy.cut()
        await until(lambda: two.degraded, "degraded")
        server.empty()
        await answered(lambda: one.put("/w/new", b"1"))
        await one.put("/empty/not", b"1")
        while await one.put("/x", b"") <= last + 10:
            pass
        proxy.heal()
        await until(lambda: "/w/new" in told.entries, "what is there now")
        await until(lambda: "/empty/not" in none_there.entries, "the first there")
        assert told.values == {"/w/new": b"1"}
        assert told.deleted == ["/w/forgotten"]


@in_loop
async def test_silent_streams_are_opened_anew_from_where_they_were(server, monkeypatch):
    monkeypatch.setattr(etcd_watch, "SILENCE_S", 0.1)
    async with emptied(server.address, server.address) as (one, two):
        told = Told()
        watch = await one.watch("/w/", told)
        for number in range(20):
            begun = watch.num_streams
            await two.put(f"/w/{number % 3}", str(number).encode())
            await until(lambda: watch.num_streams > begun, "another stream")
        await until(lambda: len(told.changes) == 20, "every change")
        assert watch.num_listings == 1
        assert not one.degraded


@in_loop
async def test_of_several_endpoints_one_that_works_is_found(server):
    dead = [f"127.0.0.1:{port}" for port in free_ports(2)]
    address = f"etcd://{dead[0]},{dead[1]},{server.endpoint}"
    async with registries(address) as (one,):
        revision = await one.put("/a", b"x")  # a write is sent once, and not to the dead
        assert (await one.get("/a")).mod_revision == revision
        assert not one.degraded
        told = Told()
        await one.watch("/a", told)
        assert told.values == {"/a": b"x"}


def test_a_full_etcd_answers_reads_and_says_why_it_takes_no_writes(tmp_path):
    async def main(server):
        async with registries(server.address) as (one,):
            registration = Registration(one, "/w/me", lambda: b"me", 2.0)
            assert await registration.attempt()
            with pytest.raises(OverloadedError, match="database space exceeded"):
                for number in range(400):
                    await one.put(f"/fill/{number % 2}", b"x" * (60 << 10))
            assert one.degraded
            with pytest.raises(OverloadedError):
                await one.grant(5.0)
            assert (await one.get("/w/me")).value == b"me"
            assert await one.keep_alive(registration.lease_id) > 0
            assert one.degraded
            server.ctl("compact", str(server.revision()))
            server.ctl("defrag")
            server.ctl("alarm", "disarm")
            await one.put("/fill/0", b"")
            assert not one.degraded
            await registration.withdraw()

    with one_etcd(tmp_path, "--quota-backend-bytes", str(8 << 20)) as server:
        run(main(server))


def test_closing_ends_what_is_under_way_and_leaves_nothing(server):
    async def once():
        async with registries(server.address, timeout_s=20.0) as (one,):
            told = Told()
            await one.put("/a", b"x")
            await one.watch("/", told)
            server.freeze()
            try:
                waits = [asyncio.create_task(call) for call in (one.get("/a"), one.grant(2.0))]
                await asyncio.sleep(0.1)
                await one.close()
                await one.close()
                for result in await asyncio.gather(*waits, return_exceptions=True):
                    assert isinstance(result, ClosedError)
            finally:
                server.thaw()
            with pytest.raises(ClosedError):
                await one.put("/a", b"x")
            with pytest.raises(ClosedError):
                await one.watch("/", told)

    run(once())  # gRPC keeps a few threads of its own once it was used
    before = num_threads()
    for _ in range(3):
        run(once())
    wait_until(lambda: num_threads() <= before, "the end of all threads")
