"""A router's index over sockets: fake instances and a real daemon, floods, lost words, restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from hashlib import sha256

from tests.router.fake_instance import MODEL, FakeInstance
from tests.router.router_bench import until
from xllm.config.kvcache import KvCacheSettings
from xllm.kvcache.daemon import KvCacheDaemon
from xllm.kvcache.daemon_client import CacheClient
from xllm.kvcache.digest import digest_of
from xllm.kvcache.index_parts import CachedPrefix
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BlockEvents, InstanceHeartbeat, SnapshotOfBlocks
from xllm.protocol.instance import QuerySnapshot
from xllm.router.kv_feed import DAEMONS

NUM_BLOCKS = 100_000
FLOOD_WORDS, WORD_BLOCKS = 3200, 20


def name(number):
    return sha256(number.to_bytes(8, "big")).digest()


class CachingInstance(FakeInstance):
    """It has blocks, and says so as a master does. `tells`: whether its words say what came."""

    def __init__(self, *args, **more) -> None:
        self.held: dict[bytes, None] = {}
        self.fresh: list[bytes] = []
        self.digest = 0
        self.tells = True
        self.answers = True
        self.num_asked = 0
        super().__init__(*args, **more)

    def store(self, hashes) -> None:
        hashes = list(hashes)
        self.held.update(dict.fromkeys(hashes))
        self.fresh += hashes
        self.digest ^= digest_of(b"".join(hashes))

    def publish(self) -> None:
        self._seq += 1
        fresh, self.fresh = self.fresh, []
        events = (BlockEvents(b"".join(fresh)),) if fresh and self.tells else ()
        word = InstanceHeartbeat(
            self.name,
            self.name,
            self._seq,
            self.state,
            events=events,
            num_cached=len(self.held),
            digest=self.digest,
        )
        self._bus.publish(b"instance", word)

    async def _beat(self) -> None:
        while True:
            self.publish()
            await asyncio.sleep(0.05)

    def _on_message(self, identity, message, frames) -> None:
        if not isinstance(message, QuerySnapshot):
            super()._on_message(identity, message, frames)
            return
        self.num_asked += 1
        if self.answers:
            self.publish()
            answer = SnapshotOfBlocks(self.name, self.name, self._seq, b"".join(self.held))
            self._socket.send(identity, answer)


async def caching(b, instance_name):
    one = CachingInstance(b.transport, b.registry, b.run_dir, instance_name)
    b.instances.append(one)
    await one.register()
    view = b.router.service.view
    await until(lambda: any(seen.name == instance_name for seen in view.usable(MODEL)))
    return one


def is_equal(b, one):
    """Whether the router has exactly what the instance has."""
    feed = b.router.service.kv
    part = feed.indices[MODEL].part(one.name, "device")
    told = (part.num_blocks, part.digest)
    follower = feed.followers[PeerRole.MASTER, one.name]
    return follower.is_known and told == (
        len(one.held),
        one.digest,
    )


def test_an_index_of_a_hundred_thousand_blocks_is_there_soon_after_the_router(in_bench):
    async def body(b):
        one = CachingInstance(b.transport, b.registry, b.run_dir, "a")
        b.instances.append(one)
        one.store(map(name, range(NUM_BLOCKS)))
        one.publish()  # nobody listens yet
        await one.register()
        await until(lambda: (PeerRole.MASTER, "a") in b.router.service.kv.followers)
        await until(lambda: is_equal(b, one))
        feed = b.router.service.kv
        assert one.num_asked == feed.figures.num_resyncs == 1
        found = feed.match(MODEL, b"".join(map(name, range(1000))))
        assert found == {"a": CachedPrefix(1000)}
        one.store([name(-1 % 2**64)])
        await until(lambda: is_equal(b, one) and len(one.held) == NUM_BLOCKS + 1)
        feed.indices[MODEL].check()
        assert feed.figures.num_mismatches == 0

    in_bench(body)


def test_a_flood_that_a_busy_router_does_not_read_leaves_a_gap_and_then_the_truth(in_bench):
    async def body(b):
        one = await caching(b, "a")
        feed = b.router.service.kv
        await until(lambda: is_equal(b, one))
        flood = [[os.urandom(32) for _ in range(WORD_BLOCKS)] for _ in range(FLOOD_WORDS)]
        # The loop does not turn meanwhile: the queues of both sides are full long before the end.
        for hashes in flood:
            one.store(hashes)
            one.publish()
        await until(lambda: feed.figures.num_gaps > 0)
        await until(lambda: is_equal(b, one))
        assert feed.figures.num_words < FLOOD_WORDS
        index = feed.indices[MODEL]
        index.check()
        assert index.statistics().num_bytes <= index.statistics().max_bytes

    in_bench(body)


def test_what_is_not_told_is_found_by_the_digest_and_a_lost_answer_is_asked_for_again(in_bench):
    async def body(b):
        one = await caching(b, "a")
        feed = b.router.service.kv
        one.store([name(1)])
        await until(lambda: is_equal(b, one) and one.held)
        one.tells = False
        one.answers = False
        one.store([name(2)])
        await until(lambda: feed.figures.num_mismatches == 1)
        assert feed.match(MODEL, name(1)) == {}
        await until(lambda: one.num_asked == 1)
        one.answers = one.tells = True
        await until(lambda: is_equal(b, one))
        assert one.num_asked == 2
        assert set(feed.match(MODEL, name(2))) == {"a"}

    in_bench(body)


def test_who_leaves_takes_its_blocks_along(in_bench):
    async def body(b):
        one, two = await caching(b, "a"), await caching(b, "b")
        feed = b.router.service.kv
        for instance in (one, two):
            instance.store([name(1)])
        await until(lambda: set(feed.match(MODEL, name(1))) == {"a", "b"})
        b.instances.remove(one)
        await one.deregister()
        one.close()
        await until(lambda: set(feed.match(MODEL, name(1))) == {"b"})
        assert set(feed.followers) == {(PeerRole.MASTER, "b")}

    in_bench(body)


def test_a_daemon_is_heard_and_asked_over_a_connection_of_its_own(in_bench):
    async def body(b):
        settings = dataclasses.replace(
            b.settings, kvcache=KvCacheSettings(name="d", dram_bytes=1 << 20)
        )
        daemon = KvCacheDaemon(settings, b.transport)
        await daemon.open()
        client = CacheClient(
            b.transport,
            daemon.record().endpoint,
            peer="test",
            layout="L",
            block_bytes=4096,
            timeout_s=5.0,
            retry_s=0.05,
        )
        try:
            assert await client.wait_attached(5.0)
            await client.put(b"".join(map(name, range(5))), [bytes(4096)] * 5)
            feed, daemon_d = b.router.service.kv, (PeerRole.DAEMON, "d")
            await until(lambda: len(feed.match(MODEL, name(0))) == 1)
            assert feed.match("any", b"".join(map(name, range(9)))) == {"d": CachedPrefix(0, 5)}
            resyncs = feed.figures.num_resyncs
            feed.followers[daemon_d].doubt(asyncio.get_running_loop().time())
            assert feed.match(MODEL, name(0)) == {}
            await until(lambda: feed.followers[daemon_d].is_known)
            assert feed.figures.num_resyncs > resyncs
            assert feed.match("any", b"".join(map(name, range(9)))) == {"d": CachedPrefix(0, 5)}
            assert feed.indices[DAEMONS].part("d", "dram").digest == daemon.tier.digest
        finally:
            await client.close()
            await daemon.close()
        await until(lambda: daemon_d not in feed.followers)
        assert feed.match("any", name(0)) == {}

    in_bench(body)
