"""Leaders that die, stand still, are cut off or are asked to go, in a cluster of real processes.

One cluster for all. The lease is two seconds.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from tests.router.leadership.leader_cluster import (
    CLUSTER,
    LEASE_S,
    Leader,
    LeaderCluster,
    Load,
    Watcher,
    is_ready,
    read_metrics,
    until,
    watching,
    whole_cluster,
)
from xllm.errors import InvalidRequestError, UnavailableError
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import AssignRole, DrainInstance, EpochRefused, InstanceReply
from xllm.protocol.records import kv_key, load_key, roles_key, slo_key
from xllm.protocol.transport.dealer import DealerSocket

pytestmark = pytest.mark.process

NUM_ROUTERS = 3
NUM_INSTANCES = 2
STREAMS = 4
ELECTION_S = 1.5
NOBODY = Leader("", 0)
SLOW_S = 10.0
"""What a busy machine may add to any time here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """For all tests in their order; of its routers and instances some are gone after each."""
    with whole_cluster(tmp_path_factory.mktemp("leaders"), NUM_INSTANCES, NUM_ROUTERS) as made:
        yield made


def scenario(cluster, test):
    """Runs a coroutine function of (watcher, the leader, clients of the other routers)."""

    async def run() -> None:
        async with watching(cluster) as watcher:
            for name in cluster.alive("router"):
                await watcher.client(name)
            leader = await watcher.wait_leader()
            others = [
                await watcher.client(name)
                for name in cluster.alive("router")
                if name != leader.name
            ]
            await test(watcher, leader, others)

    asyncio.run(asyncio.wait_for(run(), 150))
    check_terms(cluster)


def check_terms(cluster: LeaderCluster) -> None:
    """No two processes have led under one epoch."""
    epochs = [event["epoch"] for event in cluster.events("leadership_begins")]
    assert epochs
    assert len(set(epochs)) == len(epochs)


async def seen_by(watcher: Watcher, router: str) -> tuple[str, int]:
    """Who leads, and under which epoch, as a router shows it."""
    processes = await watcher.clients[router].status()
    leaders = [(one.name, one.epoch) for one in processes if one.role == "leader"]
    assert len(leaders) <= 1
    return leaders[0] if leaders else ("", 0)


async def all_see(watcher: Watcher, routers: list[str], leader) -> None:
    for name in routers:

        async def agrees(name: str = name) -> bool:
            return await seen_by(watcher, name) == (leader.name, leader.epoch)

        await until(agrees, what=f"{name} to see {leader}")


async def all_agree(watcher: Watcher, routers: list[str], after: int) -> Leader:
    """The leader whom the registry and all these routers name, under a higher epoch than that. On a
    busy machine it need not be the first since then: one that is late steps down."""

    async def agreed() -> Leader | None:
        named = await watcher.leader()
        if named is None or named.epoch <= after:
            return None
        seen = [await seen_by(watcher, name) for name in routers]
        return named if set(seen) == {(named.name, named.epoch)} else None

    return await until(agreed, what=f"leader of an epoch above {after} that {routers} agree on")


def test_the_leader_is_shown_and_does_its_duties(cluster):
    async def body(watcher, leader, others):
        await all_see(watcher, cluster.alive("router"), leader)
        instances = cluster.alive("instance")

        async def mirrored() -> bool:
            entry = await watcher.registry.get(roles_key(CLUSTER))
            loads = [await watcher.registry.get(load_key(CLUSTER, name)) for name in instances]
            cached = [await watcher.registry.get(kv_key(CLUSTER, name)) for name in instances]
            known = entry is not None and all(name.encode() in entry.value for name in instances)
            known = known and all(one is not None and b"num_cached" in one.value for one in cached)
            return known and all(one is not None and b'"ready"' in one.value for one in loads)

        await until(mirrored, what="roles and loads in the registry")
        figures = await watcher.metrics(leader.name)
        assert figures["xllm_router_leads"] == 1
        assert figures["xllm_router_leader_epoch"] == leader.epoch
        await commands(watcher, leader, others)
        gone = cluster.start_instance()

        async def is_mirrored() -> bool:
            return await watcher.registry.get(load_key(CLUSTER, gone)) is not None

        await until(is_mirrored, 60, f"the load of {gone}")
        cluster.signal(gone, signal.SIGTERM)
        assert await asyncio.to_thread(cluster.processes[gone].wait, 30) == 0

        async def is_forgotten() -> bool:
            return not await is_mirrored()

        await until(is_forgotten, what=f"the end of the load of {gone}")

    scenario(cluster, body)


async def commands(watcher, leader, others) -> None:
    """A role and objectives, through the leader alone; both are taken back."""
    own = watcher.clients[leader.name]
    instance = watcher.cluster.alive("instance")[0]
    with pytest.raises(UnavailableError, match=f"{leader.name} at tcp://"):
        await others[0].assign_role(instance, "prefill")
    for name, role in ((instance, "boss"), ("nobody", "decode")):
        with pytest.raises(InvalidRequestError):
            await own.assign_role(name, role)
    with pytest.raises(InvalidRequestError, match="tpot_ms"):
        await own.set_objectives(tpot_ms=-1)

    async def has(client, role: str) -> bool:
        return any(one.name == instance and one.role == role for one in await client.status())

    for role in ("prefill", "both"):
        await own.assign_role(instance, role)
        for client in (own, *others):
            await until(lambda client=client, role=role: has(client, role), what=role)
    await objectives(watcher, leader, own)
    await watcher.registry.put(slo_key(CLUSTER), b"fast")
    await until(lambda: len(watcher.cluster.events("bad_slo")) == NUM_ROUTERS, what="a refusal")
    kept = {event["kept"] for event in watcher.cluster.events("bad_slo")}
    assert kept == {"ServiceObjectives(ttft_ms=500, tpot_ms=50)"}
    with pytest.raises(InvalidRequestError, match="slo"):
        await own.set_objectives(ttft_ms=500)  # nobody knows what the other one should stay
    assert await own.set_objectives(ttft_ms=0, tpot_ms=0) == (0, 0)


async def objectives(watcher, leader, own) -> None:
    """Set together, and each by itself: what is not named stays."""

    async def held() -> bytes:
        return (await watcher.registry.get(slo_key(CLUSTER))).value

    assert await own.set_objectives() == (0, 0)
    assert await watcher.registry.get(slo_key(CLUSTER)) is None
    assert await own.set_objectives(ttft_ms=900, tpot_ms=50) == (900, 50)
    assert await held() == b'{"ttft_ms":900,"tpot_ms":50}'
    endpoint = (await watcher.routers())[leader.name].zmq_endpoint
    for flag, told in (("--ttft-ms=500", "500, tpot_ms 50"), ("--tpot-ms=70", "500, tpot_ms 70")):
        command = [sys.executable, "-m", "xllm", "slo", flag, "--endpoint", endpoint]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"ttft_ms {told}\n"), done.stderr
    assert await own.set_objectives(tpot_ms=50) == (500, 50)
    assert await held() == b'{"ttft_ms":500,"tpot_ms":50}'


def test_a_killed_leader_is_replaced_and_no_request_fails(cluster):
    async def body(watcher, leader, others):
        load = Load(cluster, others, STREAMS)
        await load.under_way()
        cluster.signal(leader.name, signal.SIGKILL)
        began = time.monotonic()
        later = await watcher.wait_leader(leader.epoch)
        took_s = time.monotonic() - began
        assert later.name != leader.name
        assert took_s < LEASE_S + ELECTION_S + SLOW_S
        agreed = await all_agree(watcher, cluster.alive("router"), leader.epoch)
        assert agreed.name != leader.name
        assert cluster.events("epoch_base_raised") == [], "no revision has gone back"
        await load.finish()

    scenario(cluster, body)


def test_a_frozen_leader_is_fenced(cluster):
    async def body(watcher, leader, others):
        load = Load(cluster, others, STREAMS)
        await load.under_way()
        cluster.signal(leader.name, signal.SIGSTOP)
        later = await watcher.wait_leader(leader.epoch)
        assert later.name != leader.name
        assert cluster.is_stopped(leader.name)
        await load.finish()
        # A word of the old leader's that was on its way all the time.
        heard: list[EpochRefused] = []
        instances = await watcher.instances()
        sockets = [
            DealerSocket(
                watcher.transport,
                record.endpoint,
                Decoder(InstanceReply),
                lambda message, frames: heard.append(message),
            )
            for record in instances.values()
        ]
        try:
            for socket in sockets:
                await knows(heard, socket, AssignRole("both", leader.epoch), later.epoch)
            heard.clear()
            for socket in sockets:
                socket.send(AssignRole("prefill", leader.epoch))
                socket.send(DrainInstance(0, leader.epoch))
            await until(lambda: len(heard) >= 2 * len(sockets), what="refusals")
        finally:
            for socket in sockets:
                socket.close()
        assert set(heard) == {EpochRefused(leader.epoch, later.epoch)}
        cluster.signal(leader.name, signal.SIGCONT)
        await all_see(watcher, cluster.alive("router"), later)
        assert (await watcher.metrics(leader.name))["xllm_router_leads"] == 0
        shown = {one.name: one for one in await watcher.clients[leader.name].status()}
        assert {(shown[name].role, shown[name].state) for name in instances} == {("both", "ready")}

        async def counted() -> bool:
            figures = await watcher.metrics(later.name)
            return figures["xllm_master_stale_commands_total"] >= len(heard)

        await until(counted, what="the count of refusals")
        assert await watcher.leader() == later

    scenario(cluster, body)


async def knows(heard: list[EpochRefused], socket, word: AssignRole, highest: int) -> None:
    """An instance has heard of an epoch: it refuses that word of a lower one."""

    def refused() -> bool:
        if EpochRefused(word.epoch, highest) in heard:
            return True
        socket.send(word)
        return False

    heard.clear()
    await until(refused, what="a word of the new leader to each instance")


def test_a_leader_that_is_cut_off_from_the_registry_steps_down_in_time(cluster):
    async def body(watcher, leader, others):
        http = watcher.http[leader.name]
        load = Load(cluster, list(watcher.clients.values()), STREAMS)
        await load.under_way()
        cluster.signal("registry", signal.SIGSTOP)
        began = time.monotonic()
        try:

            async def leads_no_more() -> bool:
                return (await read_metrics(http))["xllm_router_leads"] == 0

            await until(leads_no_more, what="the leader to step down")
            took_s = time.monotonic() - began
            assert cluster.is_stopped("registry")
            assert took_s < LEASE_S + SLOW_S
            await all_see(watcher, cluster.alive("router"), NOBODY)
            await load.finish()
            assert cluster.is_stopped("registry")
        finally:
            cluster.signal("registry", signal.SIGCONT)
        await all_agree(watcher, cluster.alive("router"), leader.epoch)
        assert level_of_end(cluster, leader) == "warning"

    scenario(cluster, body)


def level_of_end(cluster, leader):
    [ended] = [e for e in cluster.events("leadership_ends") if e["epoch"] == leader.epoch]
    return ended["level"]


def test_a_leader_that_is_asked_to_go_hands_over_at_once(cluster):
    async def body(watcher, leader, others):
        own = watcher.clients[leader.name]
        load = Load(cluster, [own, *others], STREAMS)
        await load.under_way()
        cluster.signal(leader.name, signal.SIGTERM)

        async def refuses() -> bool:
            return not await is_ready(watcher.http[leader.name])

        await until(refuses, 5, "a leader that drains to say so")
        assert load.num_open == len(load.num_tokens), "it says so before its requests are done"
        later = await watcher.wait_leader(leader.epoch)
        assert cluster.processes[leader.name].poll() is None, "it still finishes what it has"
        await load.finish()
        assert await asyncio.to_thread(cluster.processes[leader.name].wait, 30) == 0
        assert later.name != leader.name
        assert level_of_end(cluster, leader) == "info", "nothing is wrong with an orderly end"

    scenario(cluster, body)


def test_an_instance_that_is_asked_to_go_loses_no_request(cluster):
    async def body(watcher, leader, others):
        load = Load(cluster, list(watcher.clients.values()), STREAMS)
        await load.under_way()
        victim = cluster.alive("instance")[0]

        async def runs_some() -> bool:
            processes = await watcher.clients[leader.name].status()
            return any(one.name == victim and one.num_running for one in processes)

        await until(runs_some, what=f"requests at {victim}")
        cluster.signal(victim, signal.SIGTERM)
        assert await asyncio.to_thread(cluster.processes[victim].wait, 30) == 0
        await load.finish()

    scenario(cluster, body)
