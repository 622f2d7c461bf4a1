"""The key that routers sign with outlives the registry's memory, and a router's restart."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from tests.router.router_bench import until
from xllm.config.cluster import ClusterSettings
from xllm.protocol.records import secret_key
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.router.shared_key import KEY_BYTES, MAX_KEYS, KeyRing, SharedKeys, shared_key

NAME = secret_key("default", "events")


def test_routers_sign_with_one_key(in_bench):
    async def body(b):
        keys = await asyncio.gather(*(shared_key(b.registry, "other") for _ in range(5)))
        assert len(set(keys)) == 1
        assert len(keys[0]) == KEY_BYTES
        assert b.router.service.event_keys == (await shared_key(b.registry, "default"),)
        assert b.router.service.event_keys != (keys[0],)

    in_bench(body)


async def begin_anew(b):
    """The registry ends, and another begins at its address with nothing in it."""
    endpoint = b.server.endpoint
    await b.server.close()
    b.server = EmbeddedRegistryServer(b.transport, endpoint)
    b.registry = b.server.registry
    assert await b.registry.get(NAME) is None


def test_a_registry_that_lost_its_data_gets_the_key_back(in_bench):
    async def body(b):
        (key,) = b.router.service.event_keys
        await begin_anew(b)
        while (entry := await b.registry.get(NAME)) is None:
            await asyncio.sleep(0.01)
        assert entry.value == key
        assert b.router.service.event_keys == (key,)

    in_bench(body)


def test_where_another_key_was_made_meanwhile_all_take_both(in_bench):
    async def body(b):
        (before,) = b.router.service.event_keys
        await begin_anew(b)
        made = await shared_key(b.registry, "default")  # by a router that started just then
        other: list[tuple[bytes, ...]] = []
        tasks = []
        keys = SharedKeys(
            b.registry,
            ClusterSettings(name="default"),
            other.append,
            lambda work: tasks.append(asyncio.create_task(work)),
        )
        await keys.join()
        await until(lambda: b.router.service.event_keys == (made, before))
        await until(lambda: other[-1] == (made, before))
        assert keys.complaints() == ()
        keys.close()

    in_bench(body)


STEPS = st.lists(
    st.tuples(st.sampled_from(["lose", "restart", "settle", "write"]), st.integers(0, 2)),
    max_size=12,
)


@given(STEPS)
def test_rings_agree_and_forget_no_key_that_a_living_router_signed_with(steps):
    there: dict[str, tuple[bytes, int]] = {}
    made = revision = 0

    def put(name: str, key: bytes) -> tuple[bytes, int]:
        nonlocal revision
        revision += 1
        return there.setdefault(name, (key, revision))

    def start() -> KeyRing:
        nonlocal made
        made += 1
        ring = KeyRing(NAME, put(NAME, made.to_bytes(KEY_BYTES, "big"))[0])
        for name, entry in sorted(there.items()):
            ring.seen(name, *entry)
        return ring

    rings = [start() for _ in range(3)]
    heard = [set(there) for _ in rings]
    signed = [{one.keys[0]} for one in rings]

    def write(at: int) -> None:
        """A router hears what the registry has, writes what that lacks, and hears that."""
        for name in heard[at] - set(there):
            rings[at].seen(name, None)
        for name, entry in sorted(there.items()):
            rings[at].seen(name, *entry)
        for name, key in rings[at].owed():
            rings[at].seen(name, *put(name, key))
        for name in rings[at].surplus():
            there.pop(name, None)
            rings[at].seen(name, None)
        heard[at] = set(there)
        signed[at].add(rings[at].keys[0])

    def settle() -> None:
        for at in (*range(3), *range(3)):
            write(at)

    for step, at in steps:
        if step == "lose":
            there.clear()
        elif step == "restart":
            rings[at] = start()
            heard[at] = set(there)
            signed[at] = {rings[at].keys[0]}
        elif step == "write":
            write(at)
        else:
            settle()
    settle()
    assert len({one.keys[0] for one in rings}) == 1
    for ring in rings:
        assert len(ring.keys) == len(set(ring.keys)) <= MAX_KEYS
        if made < MAX_KEYS:
            assert set().union(*signed) <= set(ring.keys)
    assert len(there) <= MAX_KEYS


def test_a_fresh_router_knows_the_latest_keys_and_the_oldest_are_deleted():
    there: dict[str, tuple[bytes, int]] = {}
    ring = KeyRing(NAME, b"0")
    revision = 0
    for number in range(1, 13):
        there.pop(NAME, None)  # lost, and made anew by a router that came just then
        revision += 1
        there[NAME] = (b"%d" % number, revision)
        ring.seen(NAME, None)
        ring.seen(NAME, *there[NAME])
        for name, key in ring.owed():
            revision += 1
            there[name] = (key, revision)
            ring.seen(name, key, revision)
        for name in ring.surplus():
            del there[name]
            ring.seen(name, None)
    assert len(there) == MAX_KEYS
    fresh = KeyRing(NAME, there[NAME][0])
    for name, entry in sorted(there.items()):
        fresh.seen(name, *entry)
    assert fresh.keys == ring.keys == tuple(b"%d" % number for number in range(12, 4, -1))
    assert fresh.surplus() == fresh.owed() == ()
