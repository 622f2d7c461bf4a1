"""What is said on a bus is said by whose bus it is: nobody with a key speaks as another."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
import structlog

from tests.router.test_other_versions import Watched
from tests.security.keyed_peers import Nodes, run, until
from xllm.cli.keys import allow_peer
from xllm.errors import BrokenError
from xllm.protocol.authority import BUS_WORDS, PeerRole
from xllm.protocol.bus import (
    DaemonHeartbeat,
    InstanceHeartbeat,
    RouterPresence,
    SnapshotOfBlocks,
)
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord, daemon_key
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.router import buses
from xllm.router.buses import PublisherBuses, role_of

ANYWHERE = "tcp://127.0.0.1:0"


def instance(name, bus, key=""):
    return InstanceRecord(
        name=name,
        incarnation="1",
        endpoint="",
        bus_endpoint=bus,
        model="m",
        model_path="",
        max_model_len=64,
        vocab_size=8,
        block_size=16,
        num_blocks=4,
        public_key=key,
    )


def daemon(name, bus):
    return DaemonRecord(name=name, incarnation="1", endpoint="", bus_endpoint=bus)


def router(name, bus):
    return RouterRecord(name=name, incarnation="1", zmq_endpoint="", bus_endpoint=bus)


def beat(name, seq):
    return InstanceHeartbeat(name, "1", seq, "ready")


async def hears(bus, message, heard):
    """Publish until it is heard: a subscription takes a moment to arrive."""
    async with asyncio.timeout(20):
        while message not in heard:
            bus.publish(b"x", message)
            await asyncio.sleep(0.002)


def test_an_admitted_publisher_cannot_speak_as_another(tmp_path):
    async def main():
        nodes = Nodes(tmp_path)
        try:
            buses, heard = {}, []
            for name in ("good", "evil"):
                nodes.admit(name, "master")
                allow_peer(str(tmp_path / name), "server", nodes.server_key)
                buses[name] = nodes.keep(PublisherSocket(nodes.transport(name), ANYWHERE))
            server = nodes.server()
            subscribed = nodes.keep(PublisherBuses(server, heard.append))
            for name, bus in buses.items():
                subscribed.hear(instance(name, bus.endpoint, nodes.keys[name]))
            for name, bus in buses.items():
                await hears(bus, beat(name, 1), heard)
            del heard[:]
            with structlog.testing.capture_logs() as logs:
                for seq in range(2, 12):
                    buses["evil"].publish(b"x", beat("good", seq))
                    buses["evil"].publish(b"x", beat("nobody", seq))
                await hears(buses["evil"], beat("evil", 2), heard)
            assert server.num_refused == 20
            assert set(heard) == {beat("evil", 2)}
            alarms = [one for one in logs if one["event"] == "publisher_speaks_as_another"]
            assert [(one["publisher"], one["says_to_be"]) for one in alarms] == [("evil", "good")]
            assert subscribed.complaints() == (
                "the bus of master evil says what is not its own: see the log",
            )
            await hears(buses["good"], beat("good", 3), heard)  # nothing came of it
            subscribed.unhear(PeerRole.MASTER, "evil")
            assert subscribed.complaints() == ()
        finally:
            await nodes.close()

    run(main())


def test_a_record_with_anothers_address_hears_nothing_of_ones_own_key(tmp_path):
    """Whoever names somebody else's bus as its own is not heard there: the key is another."""

    async def main():
        nodes = Nodes(tmp_path)
        try:
            heard = []
            for name in ("good", "evil"):
                nodes.admit(name, "master")
                allow_peer(str(tmp_path / name), "server", nodes.server_key)
            bus = nodes.keep(PublisherSocket(nodes.transport("good"), ANYWHERE))
            server = nodes.server()
            subscribed = nodes.keep(PublisherBuses(server, heard.append))
            subscribed.hear(instance("evil", bus.endpoint, nodes.keys["evil"]))
            subscribed.hear(instance("good", bus.endpoint, nodes.keys["good"]))
            await hears(bus, beat("good", 1), heard)
            bus.publish(b"x", beat("evil", 2))
            await hears(bus, beat("good", 3), heard)
            assert server.num_refused == 1  # heard by its own connection only, as no word of it
            assert set(heard) == {beat("good", 1), beat("good", 3)}
        finally:
            await nodes.close()

    run(main())


SAID = {
    PeerRole.MASTER: beat("a", 7),
    PeerRole.DAEMON: DaemonHeartbeat("a", "1", 7),
    PeerRole.ROUTER: RouterPresence("a", "1", 7, leader_epoch=9),
}
RECORDS = {PeerRole.MASTER: instance, PeerRole.DAEMON: daemon, PeerRole.ROUTER: router}


class Bench:
    """Buses of one process without keys."""

    def __enter__(self):
        self.transport = Transport()
        self.heard = []
        self.now = 0.0
        self.subscribed = PublisherBuses(self.transport, self.heard.append, lambda: self.now)
        self.published = []
        return self

    def __exit__(self, *error):
        self.subscribed.close()
        for bus in self.published:
            bus.close()
        self.transport.close()

    def publisher(self):
        bus = PublisherSocket(self.transport, f"inproc://bus-{len(self.published)}")
        self.published.append(bus)
        return bus


def heard_words(subscribed):
    """All words that reach these buses, the owner's and others'."""
    words, heard = [], subscribed._heard

    def both(bus, message):
        words.append(message)
        heard(bus, message)

    subscribed._heard = both
    return words


@pytest.mark.parametrize("role", list(RECORDS))
def test_each_kind_says_its_own_words_only(role):
    assert BUS_WORDS.keys() == RECORDS.keys()

    async def main():
        with Bench() as bench:
            bus = bench.publisher()
            record = RECORDS[role]("a", bus.endpoint)
            assert role_of(record) is role
            bench.subscribed.hear(record)
            await hears(bus, SAID[role], bench.heard)
            others = [word for kind, word in SAID.items() if kind is not role]
            for word in [*others, SnapshotOfBlocks("a", "1", 7)]:
                bus.publish(b"x", word)
            await until(lambda: bench.transport.num_refused == 3)
            assert set(bench.heard) == {SAID[role]}

    run(main())


def test_names_of_different_kinds_are_different_publishers():
    async def main():
        with Bench() as bench:
            buses = {role: bench.publisher() for role in RECORDS}
            for role, make in RECORDS.items():
                bench.subscribed.hear(make("a", buses[role].endpoint))
            for role, bus in buses.items():
                await hears(bus, SAID[role], bench.heard)
            bench.subscribed.unhear(PeerRole.ROUTER, "a")
            bench.subscribed.unhear(PeerRole.ROUTER, "never")
            del bench.heard[:]
            buses[PeerRole.ROUTER].publish(b"x", SAID[PeerRole.ROUTER])
            await hears(buses[PeerRole.MASTER], SAID[PeerRole.MASTER], bench.heard)
            assert set(bench.heard) == {SAID[PeerRole.MASTER]}
            assert bench.transport.num_refused == 0

    run(main())


def test_who_has_the_address_of_one_that_went_is_no_impostor():
    async def main():
        with Bench() as bench:
            bus = bench.publisher()
            bench.subscribed.hear(instance("went", bus.endpoint))
            bench.subscribed.hear(instance("came", bus.endpoint))
            await hears(bus, beat("came", 1), bench.heard)
            del bench.heard[:]
            await hears(bus, beat("came", 2), bench.heard)
            assert bench.transport.num_refused == 0
            assert bench.subscribed.complaints() == ()
            bus.publish(b"x", beat("other", 1))
            await hears(bus, beat("came", 3), bench.heard)
            await until(lambda: bench.transport.num_refused == 2)  # heard by both
            assert set(bench.heard) == {beat("came", 2), beat("came", 3)}

    run(main())


def test_a_process_that_restarts_at_its_address_under_another_name_is_no_impostor(run_dir):
    """The subscription of the old one hears the new one, before the registry has told of it."""

    async def main():
        with Bench() as bench, structlog.testing.capture_logs() as logs:
            words = heard_words(bench.subscribed)
            address = f"ipc://{run_dir}/fixed"
            old = PublisherSocket(bench.transport, address)
            bench.subscribed.hear(instance("went", address))
            await hears(old, beat("went", 1), bench.heard)
            old.close()
            for number, word in enumerate((beat("came", 1), DaemonHeartbeat("d", "1", 1))):
                new = PublisherSocket(bench.transport, address)
                await hears(new, word, words)
                assert word not in bench.heard
                bench.subscribed.hear((instance, daemon)[number](word.publisher, address))
                await hears(new, word, bench.heard)
                new.close()
            assert bench.transport.num_refused == 0
            assert bench.subscribed.complaints() == ()
            assert logs == []

    run(main())


def test_an_impostor_who_never_speaks_as_itself_is_named_once_no_record_can_be_that_old():
    async def main():
        with Bench() as bench:
            bus = bench.publisher()
            words = heard_words(bench.subscribed)
            bench.subscribed.lease_s = 7.0
            bench.subscribed.hear(instance("evil", bus.endpoint))
            await hears(bus, beat("good", 1), words)
            bench.now = 60.0
            bench.subscribed.tick(is_registry_silent=True)
            bench.now = 60.0 + 7.0 + buses.OUTAGE_S
            await hears(bus, beat("good", 2), words)
            assert bench.transport.num_refused == 0
            bench.now += 0.1
            bench.subscribed.tick()
            await hears(bus, beat("good", 3), words)
            assert bench.transport.num_refused == len(words)
            assert len(bench.subscribed.complaints()) == 1
            assert bench.heard == []

    run(main())


def test_a_publisher_that_comes_back_at_its_address_is_judged_anew():
    async def main():
        with Bench() as bench:
            bus = bench.publisher()
            bench.subscribed.hear(daemon("d", bus.endpoint))
            await hears(bus, DaemonHeartbeat("d", "1", 1), bench.heard)
            bus.publish(b"x", beat("good", 1))
            await hears(bus, DaemonHeartbeat("d", "1", 2), bench.heard)
            assert len(bench.subscribed.complaints()) == 1
            bench.subscribed.hear(daemon("d", bus.endpoint))  # written again
            assert len(bench.subscribed.complaints()) == 1
            again = msgspec.structs.replace(daemon("d", bus.endpoint), incarnation="2")
            bench.subscribed.hear(again)
            assert bench.subscribed.complaints() == ()
            await hears(bus, DaemonHeartbeat("d", "2", 1), bench.heard)

    run(main())


def test_a_publisher_that_moved_is_heard_where_it_is_now():
    async def main():
        with Bench() as bench:
            old, new = bench.publisher(), bench.publisher()
            bench.subscribed.hear(instance("a", old.endpoint))
            await hears(old, beat("a", 1), bench.heard)
            bench.subscribed.hear(instance("a", ""))  # of no bus: as it was
            bench.subscribed.hear(instance("a", new.endpoint))
            await hears(new, beat("a", 2), bench.heard)
            old.publish(b"x", beat("a", 3))
            await hears(new, beat("a", 4), bench.heard)
            assert beat("a", 3) not in bench.heard

    run(main())


def test_an_address_that_cannot_be_is_left_alone():
    async def main():
        with Bench() as bench, structlog.testing.capture_logs() as logs:
            bench.subscribed.hear(instance("a", "nonsense://x"))
            assert [one["event"] for one in logs] == ["bus_unreachable"]
            bus = bench.publisher()
            bench.subscribed.hear(instance("a", bus.endpoint))
            await hears(bus, beat("a", 1), bench.heard)

    run(main())


def test_a_bus_that_could_not_be_opened_is_tried_again(monkeypatch):
    def fails(*arguments, **more):
        raise BrokenError("too many open files")

    async def main():
        with Bench() as bench, structlog.testing.capture_logs() as logs:
            bus = bench.publisher()
            with monkeypatch.context() as without:
                without.setattr(buses, "SubscriberSocket", fails)
                for name in ("a", "gone"):
                    bench.subscribed.hear(instance(name, bus.endpoint))
                bench.subscribed.tick()
                bench.subscribed.unhear(PeerRole.MASTER, "gone")
            assert [one["publisher"] for one in logs] == ["a", "gone"]  # said once
            bench.subscribed.tick()
            await hears(bus, beat("a", 1), bench.heard)
            bus.publish(b"x", beat("gone", 1))
            await hears(bus, beat("a", 2), bench.heard)
            assert set(bench.heard) == {beat("a", 1), beat("a", 2)}

    run(main())


def test_health_names_who_speaks_as_another(run_dir):
    async def main():
        async with Watched() as one:
            bus = PublisherSocket(one.transport, f"ipc://{run_dir}/bus")
            await one.put(daemon_key("c", "d"), daemon("d", bus.endpoint))
            async with asyncio.timeout(20):
                while one.transport.num_refused == 0:
                    bus.publish(b"x", DaemonHeartbeat("d", "1", 1))
                    bus.publish(b"x", RouterPresence("leader", "1", 1, leader_epoch=1 << 50))
                    await asyncio.sleep(0.002)
            words = "the bus of daemon d says what is not its own: see the log"
            assert words in await one.amiss()
            await one.registry.delete(daemon_key("c", "d"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert words not in await one.amiss()
            bus.close()

    run(main())
