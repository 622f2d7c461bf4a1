"""How soon who may not is told so: bad keys, roles that may not, operations that are none there.

    python -m benchmarks.refusals [--count 500] [--json]

A service and a registry with keys (the toy engine, one machine), and one stranger at a time. Each
figure is from the first byte of a try, a new connection where it is about keys, to the moment in
which the stranger knows that it is refused; milliseconds.

    http_no_key, http_bad_key    a completion without an API key, and with an unknown one: 401
    http_near_key                with one that differs from a known one in its last character
    curve_bad_key                a key that is on no list: ZeroMQ's refusal
    role_unfit                   a client's key says what only administrators may: permission_denied
    role_unknown                 a worker's key, which has no role at that port: the same
    operation_unfit              a message of another conversation at the port of clients
    registry_role, registry_owner   a write that the role may not; of a key that is another's

`admitted` is a question that is answered, for comparison. Kinds take turns in an order drawn by
lot. `near_or_bad` says whether times tell how near a guess of an API key came: the chance that of a
time of `http_near_key` and one of `http_bad_key` the smaller is the first's, with its 95% interval,
and `p` of a permutation test (see two_samples).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator

import uvloop

from benchmarks.service import free_port, wait_http
from benchmarks.two_samples import compare
from xllm.cli.keys import allow_peer
from xllm.errors import PermissionDeniedError
from xllm.protocol.administration import SetRole
from xllm.protocol.client import BadMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import RequestFailed
from xllm.protocol.message import MapMessage
from xllm.protocol.questions import Ping, Pong
from xllm.protocol.records import instance_key, leader_key
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.security import Security, create_keys

LIMIT_S = 10.0
KNOWN, NEAR, BAD = "known-0123456789abcdef", "known-0123456789abcdex", "other-fedcba9876543210"
ROLES = {"client": "client", "worker": "worker", "master": "master", "other": "master"}
"""Of each stranger's key; that of `nobody` is on no list."""


class Unfit(MapMessage, tag="step_result", frozen=True):
    """A word of another conversation."""

    id: int = 1


class Strangers:
    """Keys, by who has them, and where to go with them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.port, self.zmq_port, self.registry_port = free_port(), free_port(), free_port()
        self.node = f"{folder}/node"
        self.public_key = create_keys(self.node)
        for name, role in ROLES.items():
            allow_peer(self.node, name, create_keys(f"{folder}/{name}"), roles=(role,))
        create_keys(f"{folder}/nobody")
        self.registry = f"tcp://127.0.0.1:{self.registry_port}"

    def transport(self, name: str) -> Transport:
        """With that one's keys."""
        return Transport(Security.load(f"{self.folder}/{name}"))

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """The service and the registry, as processes."""
        keys = pathlib.Path(self.folder, "api-keys")
        keys.touch(0o600)
        keys.write_text(f"somebody:{KNOWN}\n")
        run = [sys.executable, "-m", "xllm"]
        serve = [*run, "serve", "--worker-engine", "toy", "--port", str(self.port)]
        serve += ["--zmq-port", str(self.zmq_port), "--api-key-file", str(keys)]
        commands = [serve, [*run, "registry", "--cluster-registry", self.registry]]
        with open(os.path.join(self.folder, "log"), "wb") as log:
            processes = [
                subprocess.Popen([*one, "--cluster-keys-dir", self.node], stdout=log, stderr=log)
                for one in commands
            ]
            try:
                wait_http(f"http://127.0.0.1:{self.port}/health/live", processes[0])
                yield
            finally:
                for process in processes:
                    process.send_signal(signal.SIGINT)
                for process in processes:
                    process.wait(30)

    def try_http(self, key: str) -> float:
        """One completion with that API key, or without one."""
        headers = {"content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        body = json.dumps({"model": "demo", "prompt": "hello", "max_tokens": 1})
        began = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("POST", "/v1/completions", body, headers)
            status = connection.getresponse().status
        took_s = time.perf_counter() - began
        expect(status == 401, f"HTTP {status}")
        return took_s

    async def try_curve(self, transport: Transport) -> float:
        """One connection with a key that nobody admits."""
        refused = asyncio.Event()
        began = time.perf_counter()
        socket: DealerSocket[RouterMessage] = DealerSocket(
            transport,
            f"tcp://127.0.0.1:{self.zmq_port}",
            Decoder(RouterMessage),
            lambda message, frames: expect(False, str(message)),
            on_refused=refused.set,
            server_key=self.public_key,
        )
        await asyncio.wait_for(refused.wait(), LIMIT_S)
        took_s = time.perf_counter() - began
        socket.close()
        return took_s


class Asker:
    """One connection to the port of clients."""

    def __init__(self, strangers: Strangers, transport: Transport) -> None:
        self._answer: asyncio.Future[RouterMessage] | None = None
        self._socket: DealerSocket[RouterMessage] = DealerSocket(
            transport,
            f"tcp://127.0.0.1:{strangers.zmq_port}",
            Decoder(RouterMessage),
            self._heard,
            server_key=strangers.public_key,
        )

    def _heard(self, message: RouterMessage, frames: list[bytes]) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    async def ask(self, question: MapMessage, kind: type, code: str = "") -> float:
        """Seconds to an answer of that kind (and code)."""
        self._answer = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._socket.send(question)
        answer = await asyncio.wait_for(self._answer, LIMIT_S)
        took_s = time.perf_counter() - began
        expect(isinstance(answer, kind) and getattr(answer, "code", "") == code, str(answer))
        return took_s

    def close(self) -> None:
        self._socket.close()


async def measure(strangers: Strangers, count: int) -> dict[str, list[float]]:
    """Seconds of each try, by kind; one after the other."""
    names = ("nobody", "client", "worker", "master", "other")
    transports = {name: strangers.transport(name) for name in names}
    client, worker = (Asker(strangers, transports[name]) for name in ("client", "worker"))
    registries = {
        name: RemoteRegistry(transports[name], strangers.registry, server_key=strangers.public_key)
        for name in ("master", "other")
    }
    owned = instance_key("default", "mine")
    await registries["master"].put(owned, b"x")

    async def refused_write(name: str, key: str) -> float:
        began = time.perf_counter()
        try:
            await registries[name].put(key, b"y")
        except PermissionDeniedError:
            return time.perf_counter() - began
        raise SystemExit(f"{name} wrote {key}")

    denied = PermissionDeniedError.code
    set_role = SetRole(id=1, instance="i", role="both")
    tries: dict[str, Callable[[], Awaitable[float]]] = {
        "admitted": lambda: client.ask(Ping(1), Pong),
        "http_no_key": lambda: asyncio.to_thread(strangers.try_http, ""),
        "http_bad_key": lambda: asyncio.to_thread(strangers.try_http, BAD),
        "http_near_key": lambda: asyncio.to_thread(strangers.try_http, NEAR),
        "curve_bad_key": lambda: strangers.try_curve(transports["nobody"]),
        "role_unfit": lambda: client.ask(set_role, RequestFailed, denied),
        "role_unknown": lambda: worker.ask(Ping(1), RequestFailed, denied),
        "operation_unfit": lambda: client.ask(Unfit(), BadMessage),
        "registry_role": lambda: refused_write("master", leader_key("default")),
        "registry_owner": lambda: refused_write("other", owned),
    }
    found: dict[str, list[float]] = {name: [] for name in tries}
    order, lot = list(tries), random.Random(7)
    for _ in range(count + 3):
        lot.shuffle(order)
        for name in order:
            found[name].append(await tries[name]())
    for registry in registries.values():
        await registry.close()
    for asker in (client, worker):
        asker.close()
    for transport in transports.values():
        transport.close()
    return {name: times[3:] for name, times in found.items()}


def expect(holds: bool, what: str) -> None:
    """SystemExit where something else came of a try than what is measured."""
    if not holds:
        raise SystemExit(f"not refused as it should be: {what}")


def figures(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and the worst, milliseconds."""
    ordered = sorted(1e3 * one for one in times)
    at = {"p50": len(ordered) // 2, "p99": int(0.99 * len(ordered)), "max": len(ordered) - 1}
    return {name: round(ordered[min(place, len(ordered) - 1)], 2) for name, place in at.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="tries of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        strangers = Strangers(folder)
        with strangers.served():
            found = uvloop.run(measure(strangers, options.count))
    table = {name: figures(times) for name, times in found.items()}
    guess = dataclasses.asdict(compare(found["http_near_key"], found["http_bad_key"]))
    table["near_or_bad"] = {name: round(value, 4) for name, value in guess.items()}
    if options.json:
        print(json.dumps(table))
        return
    for name, row in table.items():
        print(f"{name:16} " + "  ".join(f"{what} {value:8g}" for what, value in row.items()))


if __name__ == "__main__":
    main()
