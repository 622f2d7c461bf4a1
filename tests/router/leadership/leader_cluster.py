"""A small cluster of real processes: a registry, instances with the toy engine, routers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from tests.cli.toy_model import expected_ids, make_toy_model
from xllm import AsyncClient
from xllm.protocol.codec import Decoder
from xllm.protocol.records import (
    InstanceRecord,
    LeaderRecord,
    RouterRecord,
    instance_key,
    leader_key,
    router_key,
)
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport

LEASE_S = 2.0
START_S = 60.0
STEP_MS = 10
CLUSTER = "default"


@dataclasses.dataclass(frozen=True)
class Leader:
    """The leader key."""

    name: str
    epoch: int


class LeaderCluster:
    """Processes by name; `router-N` and `instance-N`. What they log is JSON, a file a process."""

    def __init__(self, run_dir: pathlib.Path, tmp_path: pathlib.Path, registry: str = "") -> None:
        self.run_dir = run_dir
        self.log_dir = tmp_path / "logs"
        self.log_dir.mkdir()
        self.model = make_toy_model(tmp_path / "toy-model")
        self.registry = registry or f"ipc://{run_dir}/registry"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers = itertools.count()

    def start(self, kind: str, name: str, *flags: str) -> None:
        command = [sys.executable, "-m", "xllm", kind, "--registry", self.registry]
        command += ["--cluster-run-dir", str(self.run_dir), "--cluster-lease-s", str(LEASE_S)]
        command += ["--log-dir", str(self.log_dir), "--cluster-log-format", "json"]
        with (self.log_dir / f"{name}.stderr").open("wb") as errors:
            self.processes[name] = subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                process_group=0,
            )

    def start_registry(self) -> None:
        self.start("registry", "registry")

    def start_instance(self) -> str:
        name = f"instance-{next(self._numbers)}"
        toy = ["--engine", "toy", "--worker-toy-step-ms", str(STEP_MS)]
        self.start("master", name, "--model", self.model, "--master-name", name, *toy)
        return name

    def start_router(self) -> str:
        name = f"router-{next(self._numbers)}"
        ports = ["--port", "0", "--zmq-port", "0"]
        self.start("router", name, "--model", self.model, "--router-name", name, *ports)
        return name

    def signal(self, name: str, number: int) -> None:
        """To one process; and it has had its effect when this returns."""
        process = self.processes[name]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(10)
        elif number == signal.SIGSTOP:
            deadline = time.monotonic() + 10
            while not self.is_stopped(name):
                assert time.monotonic() < deadline
                time.sleep(0.002)

    def is_stopped(self, name: str) -> bool:
        status = pathlib.Path(f"/proc/{self.processes[name].pid}/stat").read_text()
        return status.rsplit(")", 1)[1].split()[0] == "T"

    def alive(self, kind: str) -> list[str]:
        return [
            name
            for name, process in self.processes.items()
            if name.startswith(kind) and process.poll() is None
        ]

    def events(self, name: str) -> list[dict[str, Any]]:
        """All lines that processes logged of an event."""
        found = []
        for path in self.log_dir.glob("*.log"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed process
                    event = json.loads(line)
                    if event.get("event") == name:
                        found.append({**event, "file": path.name})
        return found

    def stop(self) -> None:
        """Whatever state they are in."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)

    def complaints(self) -> str:
        """What processes said on standard error, for the message of a failed test."""
        return "\n".join(path.read_text()[-500:] for path in self.log_dir.glob("*.stderr"))


class Watcher:
    """A test's eyes in the cluster: the registry as a process sees it, and clients of routers."""

    def __init__(self, cluster: LeaderCluster, transport: Transport) -> None:
        self.cluster = cluster
        self.transport = transport
        self.registry = open_registry(cluster.registry, transport, first_timeout_s=START_S)
        self.clients: dict[str, AsyncClient] = {}
        self.http: dict[str, str] = {}
        """Addresses of the routers that there are clients of."""

    async def leader(self) -> Leader | None:
        entry = await self.registry.get(leader_key(CLUSTER))
        if entry is None:
            return None
        record = Decoder(LeaderRecord).decode(entry.value)
        return Leader(record.name, record.epoch_base + entry.create_revision)

    async def wait_leader(self, after: int = 0, timeout_s: float = START_S) -> Leader:
        """A leader of a higher epoch than that."""

        async def newer() -> Leader | None:
            found = await self.leader()
            return found if found is not None and found.epoch > after else None

        return await until(newer, timeout_s, "a new leader")

    async def routers(self) -> dict[str, RouterRecord]:
        listing = await self.registry.list(router_key(CLUSTER, ""))
        records = [Decoder(RouterRecord).decode(entry.value) for entry in listing.entries]
        return {one.name: one for one in records}

    async def instances(self) -> dict[str, InstanceRecord]:
        listing = await self.registry.list(instance_key(CLUSTER, ""))
        records = [Decoder(InstanceRecord).decode(entry.value) for entry in listing.entries]
        return {one.name: one for one in records}

    async def client(self, router: str) -> AsyncClient:
        """A client of that router, which is there and ready."""
        if router not in self.clients:

            async def registered() -> RouterRecord | None:
                assert self.cluster.processes[router].poll() is None, self.cluster.complaints()
                return (await self.routers()).get(router)

            record = await until(registered, START_S, f"{router} in the registry")
            self.http[router] = record.http_address
            self.clients[router] = AsyncClient(record.zmq_endpoint, timeout_s=60)
        client = self.clients[router]

        async def ready() -> bool:
            return (await client.health()).ready

        await until(ready, START_S, f"{router} to be ready")
        return client

    async def metrics(self, router: str) -> dict[str, float]:
        """The metrics that a router serves: those of a name added up over processes."""
        return await read_metrics(self.http[router])

    async def close(self) -> None:
        for client in self.clients.values():
            await client.aclose()
        await self.registry.close()


@contextlib.asynccontextmanager
async def watching(cluster: LeaderCluster) -> AsyncIterator[Watcher]:
    transport = Transport()
    watcher = Watcher(cluster, transport)
    try:
        yield watcher
    finally:
        await watcher.close()
        transport.close()


class Load:
    """Streams at some routers, each checked token by token against what the toy engine gives."""

    def __init__(self, cluster: LeaderCluster, clients: list[AsyncClient], count: int) -> None:
        self._cluster = cluster
        self.num_tokens = [0] * (count * len(clients))
        self.max_tokens = 300
        self._tasks = [
            asyncio.ensure_future(self._run(client, number * len(clients) + place))
            for place, client in enumerate(clients)
            for number in range(count)
        ]

    @property
    def num_open(self) -> int:
        return sum(not task.done() for task in self._tasks)

    async def under_way(self) -> None:
        """All streams are open and have had tokens."""
        await until(lambda: all(self.num_tokens), 30, "tokens in all streams")
        assert self.num_open == len(self._tasks)

    async def finish(self) -> None:
        """Every one ends as it should have."""
        await asyncio.wait_for(asyncio.gather(*self._tasks), 60)

    async def _run(self, client: AsyncClient, number: int) -> None:
        prompt = (70, 71, 80 + number)
        stream = client.stream(prompt, max_tokens=self.max_tokens, seed=number, hold_ms=0)
        async for _ in stream:
            self.num_tokens[number] += 1
        expected = expected_ids(self._cluster.model, prompt, self.max_tokens, seed=number)
        assert stream.completion.token_ids == expected


async def read_metrics(http: str) -> dict[str, float]:
    """The metrics at an HTTP address: those of a name added up over processes, without the other
    routers'."""

    def read() -> bytes:
        with urllib.request.urlopen(f"{http}/metrics", timeout=10) as answer:
            return bytes(answer.read())

    found: dict[str, float] = {}
    text = (await asyncio.to_thread(read)).decode()
    own = re.search(r'[{,]router="([^"]+)"', text)
    assert own is not None
    for line in text.splitlines():
        router = re.search(r'[{,]router="([^"]+)"', line)
        if not line.startswith("#") and (router is None or router[1] == own[1]):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


async def is_ready(http: str) -> bool:
    """Whether a router says so at /health/ready, where it answers."""

    def read() -> int:
        try:
            with urllib.request.urlopen(f"{http}/health/ready", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code

    status = await asyncio.to_thread(read)
    assert status in (200, 503)
    return status == 200


async def until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "it") -> Any:
    """What a condition, or a coroutine function that is one, gives once it holds."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        await asyncio.sleep(0.01)


async def wait_whole(cluster: LeaderCluster) -> None:
    """Until all that was started serves."""
    async with watching(cluster) as watcher:
        for name in cluster.alive("router"):
            await watcher.client(name)
        names = set(cluster.alive("instance"))

        async def registered() -> bool:
            return set(await watcher.instances()) >= names

        await until(registered, START_S, "all instances in the registry")


@contextlib.contextmanager
def whole_cluster(
    directory: pathlib.Path, num_instances: int, num_routers: int, registry: str = ""
) -> Iterator[LeaderCluster]:
    """All of it serves in the block. `registry`: the address of one that runs; else it has one of
    its own."""
    run_dir = pathlib.Path(tempfile.mkdtemp(prefix="xr-", dir="/tmp"))
    made = LeaderCluster(run_dir, directory, registry)
    if not registry:
        made.start_registry()
    for _ in range(num_instances):
        made.start_instance()
    for _ in range(num_routers):
        made.start_router()
    try:
        asyncio.run(wait_whole(made))
        yield made
    finally:
        made.stop()
        shutil.rmtree(run_dir, ignore_errors=True)
