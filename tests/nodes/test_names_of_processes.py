"""Processes that are started under a name that another one has: alive, frozen or killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from xllm.errors import BrokenError
from xllm.protocol.codec import Decoder
from xllm.protocol.records import daemon_key, instance_key
from xllm.protocol.registry.holder import Holder
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.transport.context import Transport

pytestmark = pytest.mark.process

DEADLINE_S = 240.0
INSTANCE = instance_key("default", "i0")
DAEMON = daemon_key("default", "d0")


class Processes:
    """Processes of one cluster, each with a run directory of its own, and its registry."""

    def __init__(self, run_dir):
        self._run_dir = run_dir
        self._started = {}
        self._transport = Transport()
        self.address = f"ipc://{run_dir}/registry"
        self.registry = RemoteRegistry(self._transport, self.address)

    def start(self, role, where, lease_s, *flags):
        folder = self._run_dir / where
        folder.mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "xllm", role, *flags]
        command += ["--cluster-registry", self.address, "--cluster-lease-s", str(lease_s)]
        command += ["--cluster-run-dir", str(folder), "--cluster-shutdown-s", "2"]
        said = folder / f"{len(self._started)}.err"
        with said.open("wb") as file:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file
            )
        self._started[child] = said
        return child

    def master(self, where, lease_s):
        flags = ("--master-name", "i0", "--model-name", "toy", "--worker-engine", "toy")
        return self.start("master", where, lease_s, *flags)

    def daemon(self, where, lease_s):
        flags = ("--kvcache-name", "d0", "--kvcache-dram-bytes", "1048576")
        return self.start("kvcache", where, lease_s, *flags)

    async def holder(self, key, *, other_than=""):
        """Who has a key, once it is another incarnation than that."""
        decoder = Decoder(Holder)
        while True:
            with contextlib.suppress(BrokenError):
                entry = await self.registry.get(key)
                found = decoder.decode(entry.value) if entry is not None else Holder()
                if found.incarnation not in ("", other_than):
                    return found
            await asyncio.sleep(0.02)

    async def gone(self, key):
        while await self.registry.get(key) is not None:
            await asyncio.sleep(0.02)

    async def end_of(self, child):
        """Its exit code and what it said."""
        code = await asyncio.to_thread(child.wait)
        return code, self._started[child].read_text()

    async def close(self):
        for child in self._started:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.wait()
        await self.registry.close()
        self._transport.close()


async def refused_while_it_lives(processes, first):
    """The later of two living instances ends; the earlier one keeps its name."""
    code, said = await processes.end_of(processes.master("b", 2))
    assert code == 64, said
    [line] = [line for line in said.splitlines() if "the name 'i0' is taken" in line]
    assert line.startswith("xllm:")
    assert INSTANCE in line
    assert "another master.name" in line
    assert (await processes.holder(INSTANCE)).incarnation == first.incarnation
    pid = int(first.process.split("/")[-2])
    assert f"process {pid} of this machine" in line
    return pid


async def replaced_while_it_was_frozen(processes, child, first):
    """A daemon whose name another one took while it stood still ends when it goes on."""
    child.send_signal(signal.SIGSTOP)
    await processes.gone(DAEMON)
    assert child.poll() is None
    processes.daemon("d", 120)  # however busy the machine is, it keeps its lease
    second = await processes.holder(DAEMON)
    assert second.incarnation != first.incarnation
    child.send_signal(signal.SIGCONT)
    code, said = await processes.end_of(child)
    assert code == 75, said
    assert DAEMON in said
    assert (await processes.holder(DAEMON)).incarnation == second.incarnation


def test_a_name_is_one_living_process(run_dir):
    async def main():
        processes = Processes(run_dir)
        try:
            async with asyncio.timeout(DEADLINE_S):
                processes.start("registry", "r", 2)
                master = processes.master("a", 120)
                daemon = processes.daemon("c", 2)
                first = await processes.holder(INSTANCE)
                _, pid = await asyncio.gather(
                    replaced_while_it_was_frozen(processes, daemon, await processes.holder(DAEMON)),
                    refused_while_it_lives(processes, first),
                )
                lease_id = (await processes.registry.get(INSTANCE)).lease_id
                os.kill(pid, signal.SIGKILL)
                await processes.end_of(master)
                assert (await processes.holder(INSTANCE)).incarnation == first.incarnation
                processes.master("a", 120)
                again = await processes.holder(INSTANCE, other_than=first.incarnation)
                assert again.process != first.process
                # It did not wait: the lease of the dead one stands.
                assert await processes.registry.keep_alive(lease_id) > 0
        finally:
            await processes.close()

    asyncio.run(main())
