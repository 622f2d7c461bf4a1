"""The KV cache daemon in this process: its answers, heartbeats, registration and its client."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.cluster import ClusterSettings
from xllm.config.kvcache import KvCacheSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError, InvalidRequestError
from xllm.kvcache.daemon import KvCacheDaemon
from xllm.kvcache.daemon_client import CacheClient
from xllm.kvcache.dram import DramTier
from xllm.kvcache.service import MAX_BLOCKS, CacheService
from xllm.protocol import cache
from xllm.protocol.bus import BusMessage, DaemonHeartbeat, SnapshotOfBlocks
from xllm.protocol.cache import (
    BlocksFound,
    CacheRefused,
    CacheReply,
    CommitBlocks,
    LookUpBlocks,
    OpenArena,
    PinBlocks,
    PrefetchBlocks,
    ReserveBlocks,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import QuerySnapshot
from xllm.protocol.records import DaemonRecord
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import SubscriberSocket

BLOCK = 4096


def name(number):
    return number.to_bytes(32, "big")


def chain(*numbers):
    return b"".join(map(name, numbers))


def block(number):
    return bytes([number % 251]) * BLOCK


def run(coroutine):
    async def main():
        async with asyncio.timeout(20):
            return await coroutine

    return asyncio.run(main())


async def wait_until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def settings_for(directory, dram_bytes=1 << 20, registry=""):
    return Settings(
        cluster=ClusterSettings(run_dir=str(directory), registry=registry, heartbeat_s=0.02),
        kvcache=KvCacheSettings(name="d", dram_bytes=dram_bytes),
    )


@pytest.fixture
def transport():
    transport = Transport()
    yield transport
    transport.close()


class Running:
    """A daemon and its clients, open for the time of a `with`."""

    def __init__(self, transport, settings):
        self.transport = transport
        self.settings = settings
        self.clients = []

    async def __aenter__(self):
        self.daemon = KvCacheDaemon(self.settings, self.transport)
        await self.daemon.open()
        return self

    async def client(self, layout="L", block_bytes=BLOCK):
        client = CacheClient(
            self.transport,
            self.daemon.record().endpoint,
            peer="test",
            layout=layout,
            block_bytes=block_bytes,
            timeout_s=1.0,
            retry_s=0.05,
        )
        self.clients.append(client)
        assert await client.wait_attached(5.0)
        return client

    async def __aexit__(self, *error):
        for client in self.clients:
            await client.close()
        await self.daemon.close()


def test_what_one_client_puts_another_gets(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            one, two = await running.client(), await running.client()
            other = await running.client(layout="M")
            blocks = [block(n) for n in range(3)]
            assert await one.put(chain(0, 1, 2), blocks) == 3
            assert await one.put(chain(0, 1, 2), blocks) == 0
            assert await two.look_up(chain(0, 1, 9, 2)) == 2
            assert await two.get(chain(0, 1, 2)) == blocks
            assert await two.get(chain(1, 9, 2)) == blocks[1:2]
            assert await two.get(chain(9)) == []
            assert await other.look_up(chain(0)) == 0
            assert two.statistics().num_got == 4
            await wait_until(lambda: running.daemon.tier.statistics().num_pinned == 0)
            running.daemon.tier.check()

    run(main())


def test_a_corrupt_byte_is_a_miss_and_the_block_is_forgotten(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            await client.put(chain(0, 1), [block(0), block(1)])
            ((offset, _),) = running.daemon.tier.pin(*holder(running.daemon, name(1)))
            client._arena.write(offset + 77, b"\xff")
            assert await client.get(chain(0, 1)) == [block(0)]
            await wait_until(lambda: running.daemon.tier.statistics().num_dropped_total == 1)
            assert await client.look_up(chain(0, 1)) == 1
            assert client.statistics().num_bad_blocks == 1
            assert await client.put(chain(1), [block(1)]) == 1
            assert await client.get(chain(0, 1)) == [block(0), block(1)]
            running.daemon.tier.check()

    run(main())


def holder(daemon, content_hash):
    daemon.tier.open(b"looker", "L", BLOCK)
    return b"looker", [content_hash]


def test_a_full_tier_keeps_the_newest(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            room = (1 << 20) // BLOCK
            for number in range(room + 10):
                assert await client.put(name(number), [block(number)]) == 1
            assert await client.look_up(name(9)) == 0
            assert await client.get(name(10)) == [block(10)]
            assert await client.get(name(room + 9)) == [block(room + 9)]
            assert running.daemon.tier.statistics().num_evicted_total == 10
            running.daemon.tier.check()

    run(main())


def test_a_client_that_leaves_holds_nothing(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            tier = running.daemon.tier
            await client.put(name(0), [block(0)])
            places = await client._ask(ReserveBlocks(901, chain(1, 2)), cache.BlockPlaces)
            assert min(places.offsets) >= 0
            await client._ask(PinBlocks(902, name(0)), cache.BlockPlaces)
            assert (tier.statistics().num_reserved, tier.statistics().num_pinned) == (2, 1)
            await client.close()
            await wait_until(lambda: tier.statistics().num_peers == 0)
            assert (tier.statistics().num_reserved, tier.statistics().num_pinned) == (0, 0)
            tier.check()
            assert await client.look_up(name(0)) == 0

    run(main())


def test_heartbeats_tell_every_change_and_a_snapshot_fits_them(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            beats, replies = [], []
            listener = SubscriberSocket(
                transport,
                running.daemon.record().bus_endpoint,
                Decoder(BusMessage),
                lambda topic, message: beats.append(message),
            )
            await wait_until(lambda: beats)
            client = await running.client()
            await client.put(chain(1, 2), [block(1), block(2)])
            await client._ask(cache.DropBlocks(900, name(1)), cache.CacheDone)
            asker = DealerSocket(
                transport,
                running.daemon.record().endpoint,
                Decoder(CacheReply | SnapshotOfBlocks),
                lambda message, frames: replies.append(message),
            )
            asker.send(QuerySnapshot())
            await wait_until(lambda: replies)
            snapshot = replies[0]
            assert snapshot.hashes == name(2)
            await wait_until(lambda: beats[-1].seq >= snapshot.seq)
            known = set()
            for beat in beats:
                assert isinstance(beat, DaemonHeartbeat)
                for events in beat.events if beat.seq <= snapshot.seq else ():
                    known |= {events.stored[i : i + 32] for i in range(0, len(events.stored), 32)}
                    known -= {events.removed[i : i + 32] for i in range(0, len(events.removed), 32)}
            assert known == {name(2)}
            seqs = [beat.seq for beat in beats]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
            assert beats[-1].dram_capacity_bytes == 1 << 20
            await wait_until(lambda: b"dram_blocks 1\n" in b"".join(b.metrics for b in beats))
            asker.close()
            listener.close()

    run(main())


def test_it_registers_and_withdraws(transport, tmp_path):
    async def main():
        server = EmbeddedRegistryServer(transport, f"ipc://{tmp_path}/registry")
        settings = settings_for(tmp_path, registry=server.endpoint)
        async with Running(transport, settings) as running:
            entry = await server.registry.get("/xllm/default/daemons/d")
            record = Decoder(DaemonRecord).decode(entry.value)
            assert record == running.daemon.record()
            assert entry.lease_id
        assert await server.registry.get("/xllm/default/daemons/d") is None
        await server.close()

    run(main())


def test_a_daemon_that_comes_back_is_attached_again(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            await client.put(name(1), [block(1)])
            await running.daemon.close()
            await wait_until(lambda: not client.attached)
            assert await client.look_up(name(1)) == 0
            assert await client.get(name(1)) == []
            assert await client.put(name(1), [block(1)]) == 0
            running.daemon = KvCacheDaemon(running.settings, transport)
            await running.daemon.open()
            assert await client.wait_attached(5.0)
            assert await client.get(name(1)) == []
            assert await client.put(name(1), [block(1)]) == 1
            assert await client.get(name(1)) == [block(1)]
            assert client.statistics().num_attaches == 2

    run(main())


def test_a_daemon_that_hangs_costs_one_timeout(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            await client.put(name(1), [block(1)])
            answer = running.daemon._service.handle
            running.daemon._service.handle = lambda peer, message: CacheRefused(-5, "", "")
            client._timeout_s = 0.05
            assert await client.look_up(name(1)) == 0
            assert not client.attached
            running.daemon._service.handle = answer
            assert await client.wait_attached(5.0)
            assert await client.get(name(1)) == [block(1)]

    run(main())


def test_wrong_sizes_are_the_callers_error(transport, tmp_path):
    async def main():
        async with Running(transport, settings_for(tmp_path)) as running:
            client = await running.client()
            with pytest.raises(InvalidRequestError):
                await client.put(name(1), [b"short"])
            with pytest.raises(InvalidRequestError):
                await client.put(chain(1, 2), [block(1)])
            with pytest.raises(InvalidRequestError):
                await client.get(b"x" * 31)

    run(main())


def test_a_daemon_without_an_address_does_not_start(transport):
    async def main():
        daemon = KvCacheDaemon(Settings(), transport)
        with pytest.raises(ConfigError):
            await daemon.open()
        await daemon.close()

    run(main())


def opened_service(dram_bytes=1 << 16):
    service = CacheService(DramTier(dram_bytes), "/proc/1/fd/1", dram_bytes)
    assert isinstance(service.handle(b"p", OpenArena(1, "p", "L", 64)), cache.ArenaOpened)
    return service


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (LookUpBlocks(5, b"x" * 33), "invalid_value"),
        (LookUpBlocks(5, bytes(32) * (MAX_BLOCKS + 1)), "invalid_value"),
        (CommitBlocks(5, bytes(32), bytes(15)), "invalid_value"),
        (CommitBlocks(5, bytes(32), bytes(32)), "invalid_value"),
        (OpenArena(5, "p", "L", 65), "invalid_value"),
        (OpenArena(5, "p", "x" * 1000, 64), "invalid_value"),
    ],
)
def test_malformed_requests_are_refused_by_name(request_, code):
    service = opened_service()
    reply = service.handle(b"p", request_)
    assert isinstance(reply, CacheRefused)
    assert (reply.id, reply.code) == (5, code)
    assert b"refused_requests_total 1\n" in service.metrics()


def test_no_request_is_answered_before_the_arena_was_opened():
    service = CacheService(DramTier(1 << 16), "", 1 << 16)
    for number, request in enumerate(cache.CacheRequest.__args__):
        if request is OpenArena:
            continue
        arguments = [b""] * (len(request.__struct_fields__) - 1)
        reply = service.handle(b"stranger", request(number, *arguments))
        assert isinstance(reply, CacheRefused), request
        assert reply.id == number


def test_a_prefetch_tells_what_is_in_dram_already():
    service = opened_service()
    service.handle(b"p", ReserveBlocks(2, chain(1)))
    service.handle(b"p", CommitBlocks(3, chain(1), bytes(16)))
    assert service.handle(b"p", PrefetchBlocks(4, chain(1, 2))).num_blocks == 1
    assert service.handle(b"p", LookUpBlocks(5, chain(1, 2))) == BlocksFound(5, 1)


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=70), st.binary(max_size=40))))
def test_whatever_is_asked_gets_one_answer_and_breaks_nothing(calls):
    tier = DramTier(1 << 10)
    service = CacheService(tier, "", 1 << 10)
    service.handle(b"p", OpenArena(0, "p", "L", 64))
    kinds = [kind for kind in cache.CacheRequest.__args__ if kind is not OpenArena]
    for number, (kind, hashes, checksums) in enumerate(calls):
        request = kinds[kind % len(kinds)]
        arguments = [hashes, checksums][: len(request.__struct_fields__) - 1]
        assert service.handle(b"p", request(number, *arguments)).id == number
        tier.check()
