"""How long an instance is gone when its worker is killed, and what other streams feel of it.

    python -m benchmarks.recovery [--kills 5] [--streams 8] [--json] [-- flags of xllm serve]

Starts `xllm serve` with two instances and kills the worker of one of them (SIGKILL), first with
nobody there, then under streams. Gone: from the signal until the router may send requests there
again. Start: from the birth of the new worker's process until then, which is what a warm start
takes (its files are in the page cache). Others: the tokens of streams that the kill did not move,
while the instance is gone and in as long a time before; the time between two of them is TPOT.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

from benchmarks.cpu import process_tree
from benchmarks.service import free_port, wait_http
from xllm.client.asynchronous import AsyncClient
from xllm.client.connection import ClientConnection
from xllm.client.open_request import EndMessage
from xllm.client.requests import build_submit
from xllm.errors import XllmError
from xllm.protocol.generation import TokenDelta

POLL_S = 0.01
PATIENCE_S = 120.0
VICTIM = "instance-0"
_TITLE = "xllm:0/worker-0"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Kill:
    """One killed worker: seconds, and the others' times between tokens."""

    gone_s: float
    start_s: float
    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)


@dataclass
class Tokens:
    """When the tokens of a stream came, as long as its first attempt ran."""

    times: list[float] = field(default_factory=list)
    moved_at: float = float("inf")

    def gaps(self, begin: float, end: float) -> list[float]:
        """The times between tokens that came between these moments; none if it was moved."""
        if self.moved_at < end:
            return []
        inside = [one for one in self.times if begin <= one < end]
        return [later - one for one, later in itertools.pairwise(inside)]


class Stream:
    """A listener that notes times; `over` is set at its end."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.over = asyncio.Event()
        self.error: XllmError | None = None

    def on_delta(self, delta: TokenDelta) -> None:
        """Tokens came, perhaps from another instance than before."""
        now = time.monotonic()
        if delta.attempt > 1:
            self.tokens.moved_at = min(self.tokens.moved_at, now)
        self.tokens.times += [now] * len(delta.token_ids)

    def on_end(self, message: EndMessage) -> None:
        """All came."""
        self.over.set()

    def on_error(self, error: XllmError) -> None:
        """It failed."""
        self.error = error
        self.over.set()


class Load:
    """Streams that are open all the time; another follows each that ended."""

    def __init__(self, connection: ClientConnection, num_streams: int, num_tokens: int) -> None:
        self.streams: list[Tokens] = []
        self._connection = connection
        self._num_tokens = num_tokens
        self._tasks = [asyncio.create_task(self._run()) for _ in range(num_streams)]

    async def _run(self) -> None:
        while True:
            stream = Stream()
            self.streams.append(stream.tokens)
            number = self._connection.next_id()
            prompt = f"Stream {number} begins with words of its own and goes on."
            options = {"max_tokens": self._num_tokens, "ignore_eos": True, "hold_ms": 0}
            message = build_submit(
                number, options, timeout_s=PATIENCE_S, stream=True, prompt=prompt
            )
            self._connection.ask(message, stream, PATIENCE_S)
            await stream.over.wait()
            if stream.error is not None:
                raise stream.error

    async def close(self) -> None:
        """End them; an error of one is raised."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def wait_ready(client: AsyncClient) -> float:
    """Until the instance takes requests; when that was seen. `state` is what the router heard."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = [one for one in await client.status() if one.name == VICTIM]
        if found and found[0].state == "ready":
            return time.monotonic()
        await asyncio.sleep(POLL_S)
    raise SystemExit(f"{VICTIM} was not ready within {PATIENCE_S:g} s")


def worker_pid(launcher: int) -> int:
    """Pid of the instance's worker; 0: there is none."""
    for pid in process_tree(launcher):
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == _TITLE:
                return pid
    return 0


def born_at(pid: int) -> float:
    """When a process began, on the monotonic clock; to 10 ms."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[19]) / _TICKS - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


async def kill_once(launcher: int, client: AsyncClient, load: Load | None) -> Kill:
    """Kill the worker and wait for the next one."""
    pid = worker_pid(launcher)
    if not pid:
        raise SystemExit(f"no process is called {_TITLE}")
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while (await_state := await state_of(client)) == "ready":
        if time.monotonic() - killed_at > PATIENCE_S:
            raise SystemExit(f"{VICTIM} is {await_state} though its worker was killed")
        await asyncio.sleep(POLL_S)
    ready_at = await wait_ready(client)
    kill = Kill(ready_at - killed_at, ready_at - born_at(worker_pid(launcher)))
    if load is not None:
        span = kill.gone_s
        for stream in load.streams:
            kill.before += stream.gaps(killed_at - span, killed_at)
            kill.during += stream.gaps(killed_at, ready_at)
    return kill


async def state_of(client: AsyncClient) -> str:
    """What the router heard of the instance last."""
    return next((one.state for one in await client.status() if one.name == VICTIM), "absent")


async def measure(launcher: int, endpoint: str, options: argparse.Namespace) -> list[list[Kill]]:
    """The kills without and with load."""
    async with AsyncClient(endpoint) as client:
        await wait_ready(client)
        idle, busy = [], []
        for _ in range(options.kills):
            idle.append(await kill_once(launcher, client, None))
            await asyncio.sleep(options.pause)
        for _ in range(options.kills):
            load = Load(client.connection, options.streams, options.tokens)
            await asyncio.sleep(options.pause)
            busy.append(await kill_once(launcher, client, load))
            await load.close()
        return [idle, busy]


def percentile(values: list[float], share: float) -> float:
    """Of sorted copies; nan where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(idle: list[Kill], busy: list[Kill]) -> dict[str, float]:
    """Medians over the kills; the gaps of all kills together."""
    before = [gap for kill in busy for gap in kill.before]
    during = [gap for kill in busy for gap in kill.during]
    figures = {
        "gone_s": statistics.median(kill.gone_s for kill in idle),
        "start_s": statistics.median(kill.start_s for kill in idle),
        "gone_over_start": statistics.median(kill.gone_s / kill.start_s for kill in idle),
        "gone_under_load_s": statistics.median(kill.gone_s for kill in busy),
        "others_tpot_p99_before_ms": percentile(before, 0.99) * 1e3,
        "others_tpot_p99_during_ms": percentile(during, 0.99) * 1e3,
        "others_tokens": len(during),
    }
    figures["others_p99_ratio"] = (
        figures["others_tpot_p99_during_ms"] / figures["others_tpot_p99_before_ms"]
    )
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400, help="of a stream")
    parser.add_argument("--pause", type=float, default=16.0, help="seconds between two kills")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("flags", nargs="*", help="flags of xllm serve, after --")
    options = parser.parse_args()
    port, zmq_port = free_port(), free_port()
    command = [sys.executable, "-m", "xllm", "serve", "--port", str(port)]
    command += ["--zmq-port", str(zmq_port), "--serve-instances", "2", *options.flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_http(f"http://127.0.0.1:{port}/health/ready", process)
            endpoint = f"tcp://127.0.0.1:{zmq_port}"
            figures = summary(*asyncio.run(measure(process.pid, endpoint, options)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}")


if __name__ == "__main__":
    main()
