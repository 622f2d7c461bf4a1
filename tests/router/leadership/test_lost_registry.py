"""A registry that forgets everything, in a cluster of real processes: what is written back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import msgspec
import pytest

from tests.router.leadership.leader_cluster import CLUSTER, START_S, until, whole_cluster
from tests.router.leadership.test_leader_faults import all_see, scenario
from xllm.protocol.records import roles_key, slo_key

pytestmark = pytest.mark.process

NUM_ROUTERS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with whole_cluster(tmp_path_factory.mktemp("forgetful"), 1, NUM_ROUTERS) as made:
        yield made


@pytest.fixture(scope="module")
def forgetful(cluster):
    """A small cluster, its registry killed and started anew behind an operator's words; and the
    name of an instance that they gave a role, and who led."""

    async def body(watcher, leader, others):
        own = watcher.clients[leader.name]
        await own.assign_role(instance, "decode")
        assert await own.set_objectives(ttft_ms=300, tpot_ms=0) == (300, 0)

        def is_heard() -> bool:
            told = [one for one in cluster.events("slo_changed") if "ttft_ms=300," in one["slo"]]
            return len(told) >= len(cluster.alive("router"))

        await until(is_heard, what="all routers to hear of the objectives")
        cluster.signal("registry", signal.SIGKILL)
        assert cluster.processes["registry"].poll() is not None
        led.append(leader)

    instance, led = cluster.alive("instance")[0], []
    scenario(cluster, body)
    cluster.start_registry()
    return cluster, instance, led[0]


def test_a_registry_that_lost_its_data_gets_back_what_operators_wrote(forgetful):
    cluster, instance, before = forgetful

    async def body(watcher, leader, others):
        assert leader.epoch > before.epoch

        async def is_back() -> bool:
            roles = await watcher.registry.get(roles_key(CLUSTER))
            slo = await watcher.registry.get(slo_key(CLUSTER))
            known = roles is not None and msgspec.json.decode(roles.value).get(instance)
            return known == "decode" and slo is not None and b'"ttft_ms":300' in slo.value

        await until(is_back, START_S, what="roles and objectives to be written back")
        await all_see(watcher, cluster.alive("router"), leader)
        own = watcher.clients[leader.name]
        for client in others:

            async def shows(client=client) -> bool:
                return await client.set_objectives() == (300, 0)

            await until(shows, what="each router to show the objectives")

        async def is_there() -> bool:
            return any(one.name == instance for one in await own.status())

        await until(is_there, START_S, what="the instance to be there again")
        endpoint = (await watcher.routers())[follower(watcher, leader)].zmq_endpoint
        for words in (("role", instance, "both"), ("slo", "--ttft-ms=0", "--tpot-ms=0")):
            command = [sys.executable, "-m", "xllm", *words, "--endpoint", endpoint]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        assert await own.set_objectives() == (0, 0)

    scenario(cluster, body)


def follower(watcher, leader) -> str:
    return next(name for name in watcher.clients if name != leader.name)
