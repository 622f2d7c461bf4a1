"""A registry that forgets everything, in a cluster of real processes: what is written back.

The machine may be busy, and the leader change at any time: whoever leads is asked, as an operator
would, and shown is what holds in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys

import msgspec
import pytest

from tests.registry.etcd_server import one_etcd
from tests.router.leadership.leader_cluster import CLUSTER, START_S, until, whole_cluster
from tests.router.leadership.test_leader_faults import scenario, seen_by
from xllm.protocol.records import roles_key, slo_key
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport

pytestmark = pytest.mark.process

NUM_ROUTERS = 2
FAR = 500


@contextlib.contextmanager
def embedded(directory):
    """A cluster, and what makes its registry forget everything."""
    with whole_cluster(directory, 1, NUM_ROUTERS) as made:

        def forget() -> None:
            made.signal("registry", signal.SIGKILL)
            assert made.processes["registry"].poll() is not None
            made.start_registry()

        yield made, forget


@contextlib.contextmanager
def etcd(directory):
    """The same with an etcd, whose revisions begin anew far below the epochs there were."""
    with one_etcd(directory) as member:
        asyncio.run(advance(member.address))

        def forget() -> None:
            member.empty()
            member.wait_ready()

        with whole_cluster(directory, 1, NUM_ROUTERS, member.address) as made:
            yield made, forget


async def advance(address: str) -> None:
    """Have that registry's revisions come far."""
    transport = Transport()
    registry = open_registry(address, transport)
    while await registry.put("/elsewhere", b"x") < FAR:
        pass
    await registry.close()
    transport.close()


@pytest.fixture(
    params=[pytest.param(embedded), pytest.param(etcd, marks=pytest.mark.etcd)],
    ids=["embedded", "etcd"],
)
def forgetful(request, tmp_path):
    """A small cluster, whose registry forgot all behind an operator's words; and the name of an
    instance that they gave a role, and who led."""
    with request.param(tmp_path) as (cluster, forget):
        yield operated(cluster, forget)


def operated(cluster, forget):
    """See `forgetful`."""

    async def body(watcher, leader, others):
        await operate(watcher, "role", instance, "decode")
        assert await operate(watcher, "slo", "--ttft-ms=300", "--tpot-ms=0") == SET

        def is_heard() -> bool:
            told = [one for one in cluster.events("slo_changed") if "ttft_ms=300," in one["slo"]]
            return len({one["file"] for one in told}) >= len(cluster.alive("router"))

        await until(is_heard, what="all routers to hear of the objectives")
        led.append(await watcher.wait_leader())
        forget()

    instance, led = cluster.alive("instance")[0], []
    scenario(cluster, body)
    return cluster, instance, led[0]


OWN = "0 (each instance's own)"
SET, UNSET = f"ttft_ms 300, tpot_ms {OWN}\n", f"ttft_ms {OWN}, tpot_ms {OWN}\n"


async def operate(watcher, *words) -> str:
    """What `xllm` says to an operator who names a router that does not lead."""
    leader = await watcher.wait_leader()
    follower = next(name for name in watcher.clients if name != leader.name)
    endpoint = (await watcher.routers())[follower].zmq_endpoint
    command = [sys.executable, "-m", "xllm", *words, "--endpoint", endpoint]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_registry_that_lost_its_data_gets_back_what_operators_wrote(forgetful):
    cluster, instance, before = forgetful

    async def body(watcher, leader, others):
        assert (await watcher.wait_leader(before.epoch)).epoch > before.epoch

        async def is_back() -> bool:
            roles = await watcher.registry.get(roles_key(CLUSTER))
            slo = await watcher.registry.get(slo_key(CLUSTER))
            known = roles is not None and msgspec.json.decode(roles.value).get(instance)
            return known == "decode" and slo is not None and b'"ttft_ms":300' in slo.value

        await until(is_back, START_S, what="roles and objectives to be written back")

        async def agree() -> bool:
            now = await watcher.leader()
            if now is None:
                return False
            seen = [await seen_by(watcher, name) for name in cluster.alive("router")]
            return set(seen) == {(now.name, now.epoch)}

        await until(agree, START_S, what="all routers to see one leader")
        await all_show(watcher, (300, 0))

        async def is_there() -> bool:
            lists = [await client.status() for client in watcher.clients.values()]
            return all(any(one.name == instance for one in processes) for processes in lists)

        await until(is_there, START_S, what="the instance to be there again")
        in_force = {event["slo"] for event in cluster.events("slo_changed")}
        assert in_force == {"ServiceObjectives(ttft_ms=300, tpot_ms=0)"}
        assert await operate(watcher, "role", instance, "both") == f"{instance} is for both\n"
        assert await operate(watcher, "slo", "--ttft-ms=0", "--tpot-ms=0") == UNSET
        await all_show(watcher, (0, 0))

    scenario(cluster, body)


async def all_show(watcher, objectives: tuple[int, int]) -> None:
    """Every router says that these are in force."""
    for client in watcher.clients.values():

        async def shows(client=client) -> bool:
            return await client.set_objectives() == objectives

        await until(shows, what=f"each router to show {objectives}")
