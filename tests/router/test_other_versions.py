"""Processes of other versions of the protocol: named, left alone, used once they are of ours."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.router.fake_cluster import FakeCluster, in_loop
from tests.router.test_view import beat
from xllm.config.cluster import ClusterSettings
from xllm.protocol.codec import encode
from xllm.protocol.message import OLDEST_PROTOCOL, PROTOCOL_VERSION, speaks
from xllm.protocol.records import (
    DaemonRecord,
    InstanceRecord,
    RouterRecord,
    daemon_key,
    instance_key,
    router_key,
)
from xllm.protocol.registry.local import LocalRegistry
from xllm.protocol.transport.context import Transport
from xllm.router.membership import Membership, MembershipListener

OTHERS = [OLDEST_PROTOCOL - 1, PROTOCOL_VERSION + 1, 0, 2**31]


class Heard(MembershipListener):
    """Who came and went, in words."""

    def __init__(self):
        self.words = []

    def instance_registered(self, record):
        self.words.append(f"+{record.name}")

    def publisher_registered(self, record):
        self.words.append(f"+{record.name}")

    def publisher_gone(self, role, name):
        self.words.append(f"-{name}")


class Watched:
    """A membership that watches a registry of its own."""

    async def __aenter__(self):
        self.cluster = FakeCluster()
        self.service = self.cluster.service
        self.transport = Transport()
        self.registry = LocalRegistry()
        self.membership = Membership("me", self.transport, self.service)
        self.heard = Heard()
        self.membership.listeners.append(self.heard)
        await self.membership.join(self.registry, ClusterSettings(name="c"))
        return self

    async def __aexit__(self, *error):
        self.membership.close()
        self.cluster.close()
        await self.registry.close()
        self.transport.close()

    async def put(self, key, record):
        await self.registry.put(key, encode(record))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def delete(self, key):
        await self.registry.delete(key)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def amiss(self):
        """What health says of processes; that the model has no instance is another test's."""
        words = (await self.service.health(False)).degraded
        return tuple(one for one in words if one != "no instance of m is ready")


def instance(directory, name, incarnation="1", protocol=PROTOCOL_VERSION):
    return InstanceRecord(
        name=name,
        incarnation=incarnation,
        endpoint=f"ipc://{directory}/{name}",
        bus_endpoint=f"ipc://{directory}/{name}-bus",
        model="m",
        model_path="",
        max_model_len=512,
        vocab_size=330,
        block_size=4,
        num_blocks=64,
        protocol=protocol,
    )


def test_a_version_speaks_with_itself_and_no_later_one():
    assert speaks(PROTOCOL_VERSION)
    assert speaks(OLDEST_PROTOCOL)
    assert not any(map(speaks, OTHERS))


def test_records_of_before_the_field_are_of_the_first_version():
    """The default says what was, and stays when the version is raised."""
    for cls in (InstanceRecord, DaemonRecord, RouterRecord):
        found = {one.name: one.default for one in msgspec.structs.fields(cls)}
        assert found["protocol"] == 1


@pytest.mark.parametrize("version", OTHERS)
@in_loop
async def test_an_instance_of_another_version_is_named_and_left_alone(version, run_dir):
    async with Watched() as one:
        key = instance_key("c", "late")
        await one.put(key, instance(run_dir, "late", protocol=version))
        assert one.service.view.get("late") is None
        assert one.heard.words == []
        words = f"instance late speaks version {version} of the protocol, not 1 to 1"
        assert words in await one.amiss()
        await one.put(key, instance(run_dir, "late", "2"))  # it was upgraded
        assert one.service.view.get("late") is not None
        assert one.heard.words == ["+late"]
        assert words not in await one.amiss()


@in_loop
async def test_an_instance_that_comes_back_in_another_version_is_forgotten(run_dir):
    async with Watched() as one:
        key = instance_key("c", "a")
        await one.put(key, instance(run_dir, "a"))
        assert one.service.view.get("a") is not None
        await one.put(key, instance(run_dir, "a", "2", protocol=PROTOCOL_VERSION + 1))
        assert one.service.view.get("a") is None
        await one.delete(key)
        assert await one.amiss() == ()


@in_loop
async def test_a_lost_instance_whose_name_one_of_another_version_has_is_no_longer_lost(run_dir):
    async with Watched() as one:
        key = instance_key("c", "a")
        await one.put(key, instance(run_dir, "a"))
        one.service.view.heartbeat(beat("a"), one.cluster.clock.now)
        await one.delete(key)
        assert await one.amiss() == ("instance a is lost",)
        await one.put(key, instance(run_dir, "a", "2", protocol=PROTOCOL_VERSION + 1))
        words = f"instance a speaks version {PROTOCOL_VERSION + 1} of the protocol, not 1 to 1"
        assert await one.amiss() == (words,)
        assert [shown.state for shown in one.service.status().processes if shown.name == "a"] == []
        await one.delete(key)
        assert await one.amiss() == ()


@in_loop
async def test_publishers_of_another_version_are_not_heard(run_dir):
    async with Watched() as one:
        bus = f"ipc://{run_dir}/bus"
        for number in (PROTOCOL_VERSION, PROTOCOL_VERSION + 1):
            daemon = DaemonRecord(
                name="d", incarnation="1", endpoint=bus, bus_endpoint=bus, protocol=number
            )
            await one.put(daemon_key("c", "d"), daemon)
            router = RouterRecord(
                name="r", incarnation="1", zmq_endpoint="", bus_endpoint=bus, protocol=number
            )
            await one.put(router_key("c", "r"), router)
        assert one.heard.words == ["+d", "+r", "-d", "-r"]
        assert [words.split(" speaks")[0] for words in await one.amiss()] == [
            "daemon d",
            "router r",
        ]
