"""The registry on three etcd members, of which one dies and one freezes."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.registry.etcd_server import address_of, three_etcds, wait_until
from tests.registry.watcher import Told, run, until
from xllm.errors import BrokenError
from xllm.protocol.registry.etcd import EtcdRegistry
from xllm.protocol.registry.etcd_address import parse_etcd_address
from xllm.protocol.registry.keeper import Registration

pytestmark = [pytest.mark.process, pytest.mark.etcd]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three members; each test leaves all of them running."""
    with three_etcds(tmp_path_factory.mktemp("etcds")) as members:
        yield members


@contextlib.asynccontextmanager
async def watched(members, prefix):
    """A registry that prefers the first of these members, and what a watch of it told."""
    registry = EtcdRegistry(parse_etcd_address(address_of(*members)), timeout_s=4.0)
    told = Told()
    try:
        await registry.watch(prefix, told)
        yield registry, told
    finally:
        await registry.close()


async def put_until_done(registry, key, value):
    """Writes that nobody answered are sent again: how many it took."""
    for attempt in range(100):
        try:
            await registry.put(key, value)
        except BrokenError:
            await asyncio.sleep(0.05)
        else:
            return attempt + 1
    raise AssertionError(f"{key} could not be written")


def leader_first(members):
    """The members, the leading one first."""
    leader = wait_until(lambda: [one for one in members if one.is_leader], "a leader")[0]
    return [leader, *(one for one in members if one is not leader)]


async def check_through(members, prefix, hurt):
    """Watch and write through the first member while `hurt` is done to it."""
    async with watched(members, prefix) as (registry, told):
        registration = Registration(registry, f"{prefix}me", lambda: b"me", 5.0)
        assert await registration.attempt()
        expected = {f"{prefix}me": b"me"}
        for number in range(30):
            if number == 10:
                hurt()
            key, value = f"{prefix}{number % 7}", str(number).encode()
            await put_until_done(registry, key, value)
            expected[key] = value
        await until(lambda: told.values == expected, "what was written")
        assert told.deleted == []
        assert registration.num_registrations == 1
        await until(lambda: not registry.degraded, "no longer degraded")
        assert registry.connection.num_links >= 2
        await registration.withdraw()


def test_the_leader_is_killed(members):
    ordered = leader_first(members)
    run(check_through(ordered, "/killed/", ordered[0].kill))
    ordered[0].start()
    ordered[0].wait_ready()


def test_the_leader_freezes(members):
    ordered = leader_first(members)
    try:
        run(check_through(ordered, "/frozen/", ordered[0].freeze))
        assert ordered[0].state() == "T"
    finally:
        ordered[0].thaw()
    ordered[0].wait_ready()


def test_a_member_without_a_quorum_is_silence(members):
    async def main():
        ordered = leader_first(members)
        async with watched(ordered, "/quorum/") as (registry, told):
            await registry.put("/quorum/a", b"1")
            await until(lambda: told.values == {"/quorum/a": b"1"}, "the write")
            for one in ordered[1:]:
                one.kill()
            await until(lambda: registry.degraded, "degraded")
            with pytest.raises(BrokenError):
                await registry.get("/quorum/a")
            assert told.deleted == []
            for one in ordered[1:]:
                one.start()
            await put_until_done(registry, "/quorum/a", b"2")
            await until(lambda: told.values == {"/quorum/a": b"2"}, "the write after it")
            assert told.deleted == []

    run(main())
    for one in members:
        one.wait_ready()
