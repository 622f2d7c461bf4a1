"""The KV cache daemon as a real process: shared bytes, its death, its return."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from xllm.config.cluster import ClusterSettings
from xllm.config.kvcache import KvCacheSettings
from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.kvcache import process
from xllm.kvcache.daemon_client import CacheClient
from xllm.protocol.actor.children import Children, ChildSpec
from xllm.protocol.transport.context import Transport

pytestmark = pytest.mark.process

BLOCK = 1 << 16

READER = """
import asyncio, sys
from xllm.kvcache.daemon_client import CacheClient
from xllm.protocol.transport.context import Transport

async def main(endpoint, hashes):
    transport = Transport()
    client = CacheClient(transport, endpoint, peer="reader", layout="L", block_bytes=1 << 16,
                         timeout_s=2.0)
    assert await client.wait_attached(10.0)
    blocks = await client.get(hashes)
    print([(block[0], block[-1], len(block)) for block in blocks])
    await client.close()
    transport.close()

asyncio.run(main(sys.argv[1], bytes.fromhex(sys.argv[2])))
"""


def name(number):
    return number.to_bytes(32, "big")


def run(coroutine):
    async def main():
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(main())


async def wait_until(condition):
    while not condition():
        await asyncio.sleep(0.01)


class RealDaemon:
    """A daemon process and a client of it."""

    def __init__(self, run_dir):
        self.endpoint = f"ipc://{run_dir}/kv"
        self._settings = Settings(
            cluster=ClusterSettings(run_dir=str(run_dir), log_level="error"),
            kvcache=KvCacheSettings(name="d", endpoint=self.endpoint, dram_bytes=64 << 20),
        )

    async def __aenter__(self):
        self.exits = []
        self.children = Children(self.exits.append)
        self.transport = Transport()
        self.client = CacheClient(
            self.transport,
            self.endpoint,
            peer="test",
            layout="L",
            block_bytes=BLOCK,
            timeout_s=1.0,
            retry_s=0.05,
        )
        self.start()
        assert await self.client.wait_attached(20.0)
        return self

    def start(self):
        spec = ChildSpec("kvcache", process.main, (encode_settings(self._settings),))
        self.pid = self.children.start(spec)

    async def __aexit__(self, *error):
        await self.client.close()
        await self.children.stop_all(5.0)
        self.transport.close()


def test_blocks_of_one_process_are_read_by_another_and_sigterm_ends_it(run_dir):
    async def main():
        async with RealDaemon(run_dir) as daemon:
            blocks = [bytes([n]) * BLOCK for n in range(1, 9)]
            hashes = b"".join(name(n) for n in range(8))
            assert await daemon.client.put(hashes, blocks) == 8
            assert await daemon.client.look_up(hashes) == 8
            answer = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", READER, daemon.endpoint, hashes.hex()],
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert answer.returncode == 0, answer.stderr
            assert answer.stdout.strip() == str([(n, n, BLOCK) for n in range(1, 9)])
            os.kill(daemon.pid, signal.SIGTERM)
            await wait_until(lambda: daemon.exits)
            assert daemon.exits[0].code == 0
            assert not [entry for entry in os.listdir(run_dir) if entry.startswith("kv")]

    run(main())


def test_a_killed_daemon_is_a_miss_until_it_is_back(run_dir):
    async def main():
        async with RealDaemon(run_dir) as daemon:
            client = daemon.client
            assert await client.put(name(1), [b"a" * BLOCK]) == 1
            assert await client.get(name(1)) == [b"a" * BLOCK]
            os.kill(daemon.pid, signal.SIGKILL)
            await wait_until(lambda: daemon.exits)
            assert daemon.exits[0].code == -signal.SIGKILL
            assert await client.look_up(name(1)) == 0
            assert await client.get(name(1)) == []
            assert await client.put(name(1), [b"a" * BLOCK]) == 0
            await wait_until(lambda: not client.attached)
            daemon.start()
            assert await client.wait_attached(20.0)
            assert await client.get(name(1)) == []
            assert await client.put(name(1), [b"b" * BLOCK]) == 1
            assert await client.get(name(1)) == [b"b" * BLOCK]

    run(main())


def test_a_frozen_daemon_costs_one_timeout_and_is_attached_again(run_dir):
    async def main():
        async with RealDaemon(run_dir) as daemon:
            client = daemon.client
            client._timeout_s = 0.2
            assert await client.put(name(1), [b"a" * BLOCK]) == 1
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                started = asyncio.get_running_loop().time()
                assert await client.get(name(1)) == []
                for _ in range(100):
                    assert await client.look_up(name(1)) == 0
                assert asyncio.get_running_loop().time() - started < 2.0
                assert not client.attached
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            assert await client.wait_attached(20.0)
            assert await client.get(name(1)) == [b"a" * BLOCK]

    run(main())
