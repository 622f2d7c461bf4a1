"""What `xllm status` shows of instances that freeze, die and leave, in real processes.

The lease is two seconds.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys

import pytest

from tests.router.leadership.leader_cluster import until, watching, whole_cluster

pytestmark = pytest.mark.process


def test_who_freezes_or_dies_is_shown_as_lost_and_who_leaves_is_not(tmp_path):
    with whole_cluster(tmp_path, num_instances=3, num_routers=1) as cluster:
        asyncio.run(asyncio.wait_for(freeze_kill_and_leave(cluster), 120))


async def freeze_kill_and_leave(cluster) -> None:
    async with watching(cluster) as watcher:
        client = await watcher.client(cluster.alive("router")[0])
        frozen, killed, leaving = cluster.alive("instance")

        async def states() -> dict[str, str]:
            return {one.name: one.state for one in await client.status() if one.kind == "instance"}

        async def shown(**wanted: str) -> bool:
            return await states() == wanted

        async def until_shown(what: str, **wanted: str) -> None:
            await until(lambda: shown(**wanted), what=what)

        wanted = dict.fromkeys((frozen, killed, leaving), "ready")
        await until_shown("all three", **wanted)

        cluster.signal(leaving, signal.SIGTERM)
        assert await asyncio.to_thread(cluster.processes[leaving].wait, 30) == 0
        del wanted[leaving]
        await until_shown("the two that stay", **wanted)

        cluster.signal(frozen, signal.SIGSTOP)
        wanted[frozen] = "lost"
        await until_shown("the frozen one to be lost", **wanted)
        (endpoint,) = [one.zmq_endpoint for one in (await watcher.routers()).values()]
        table = await asyncio.to_thread(run_status, endpoint)
        (row,) = [line for line in table.splitlines() if line.startswith(frozen)]
        assert re.search(r"\blost\b.*\d m?s ago", row)
        assert f"degraded: instance {frozen} is lost" in table
        assert (await client.health()).ready
        cluster.signal(frozen, signal.SIGCONT)
        wanted[frozen] = "ready"
        await until_shown("its return", **wanted)

        cluster.signal(killed, signal.SIGKILL)
        wanted[killed] = "lost"
        await until_shown("the killed one to be lost", **wanted)


def run_status(endpoint: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xllm", "status", "--endpoint", endpoint],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
