"""How long instances work for clients that have left.

    python -m benchmarks.leaving [--clients 64] [--reps 10] [--json] [-- flags of xllm serve]

Starts a service of toy instances, opens streams over HTTP and over ZeroMQ, waits until all of them
run, and closes their connections at once. The time until the router hears from the instances that
nothing runs any more is an upper bound: they say so with their heartbeats (`cluster.heartbeat_s`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable

from xllm.cli.local_service import local_service
from xllm.client.asynchronous import AsyncClient
from xllm.protocol.client import RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

POLL_S = 0.005
PATIENCE_S = 30.0
TOKENS = 4000
Leave = Callable[[], None]


def http_body(model: str) -> bytes:
    """A stream that would go on for minutes, as a request of its own connection."""
    body = json.dumps(
        {"model": model, "prompt": "on and on", "max_tokens": TOKENS, "ignore_eos": True,
         "stream": True}
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask_http(url: str, model: str) -> Leave:
    """Returns how to leave, once the first token is here."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(http_body(model))
    try:
        await reader.readuntil(b"data:")
    except asyncio.IncompleteReadError as error:
        raise SystemExit(f"no stream, but {error.partial.decode(errors='replace')}") from error
    # Not its method alone: a writer that nobody has closes the connection.
    return lambda: writer.transport.abort()


async def ask_zmq(endpoint: str) -> Leave:
    """The same over ZeroMQ."""
    transport = Transport()
    heard = asyncio.Event()
    socket: DealerSocket[RouterMessage] = DealerSocket(
        transport, endpoint, Decoder(RouterMessage), lambda message, frames: heard.set()
    )
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    socket.send(SubmitRequest(id=1, prompt="on and on", sampling=sampling))
    await heard.wait()

    def leave() -> None:
        socket.close()
        transport.close()

    return leave


async def until_running(client: AsyncClient, count: int) -> None:
    """Until the instances say that so many sequences run."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            rows = await client.status()
            if sum(one.num_running for one in rows if one.kind == "instance") == count:
                return
            await asyncio.sleep(POLL_S)


async def measure(http: str, zmq: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds by protocol."""
    found = {}
    async with AsyncClient(zmq) as client:
        (model,) = await client.models()
        for name in ("http", "zmq"):
            times = []
            for _ in range(options.reps):
                asked = [
                    ask_http(http, model.name) if name == "http" else ask_zmq(zmq)
                    for _ in range(options.clients)
                ]
                leave = await asyncio.gather(*asked)
                await until_running(client, options.clients)
                began = time.monotonic()
                for one in leave:
                    one()
                await until_running(client, 0)
                times.append(1000 * (time.monotonic() - began))
            found[name] = {"p50": round(statistics.median(times)), "max": round(max(times))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Clients that leave.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one line, not indented")
    parser.add_argument("flags", nargs="*", help="of xllm serve")
    options = parser.parse_args()
    flags = ["--engine", "toy", "--instances", "2", "--worker-toy-step-ms", "20"]
    with (
        tempfile.TemporaryDirectory(prefix="xl-") as run_dir,
        local_service([*flags, "--cluster-run-dir", run_dir, *options.flags]) as service,
    ):
        found = asyncio.run(measure(service.http, service.zmq, options))
    result = {"clients": options.clients, "left_ms": found}
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
