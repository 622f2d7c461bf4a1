"""Closed-loop load over HTTP: request and SSE token rates, latency percentiles.

    python -m benchmarks.load_http --url http://127.0.0.1:8010/v1/chat/completions
                                   --concurrency 64 --seconds 5 [--stream] [--tokens 64]

A bare asyncio protocol a connection, so that the generator costs little. Prints one line of
JSON. Loopback only. A streamed token is one `data: {` event with a content piece, or as many as
the answer's usage says where several came in one event (`--count usage`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
import urllib.parse
from typing import Any

import uvloop

from benchmarks.load_zmq import add_prompt_flags, percentile, prompt_pool
from xllm.config.exposure import is_loopback
from xllm.errors import ConfigError

_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


def make_pool(options: argparse.Namespace, url: urllib.parse.SplitResult) -> list[bytes]:
    """The requests as bytes, made before the clock runs."""
    made = []
    for prompt in prompt_pool(options):
        body: dict[str, object] = {
            "model": options.model or "xllm-demo",
            "max_tokens": options.tokens,
            "temperature": 0,
            "stream": options.stream,
            "ignore_eos": True,
        }
        if options.stream:
            body["stream_options"] = {"include_usage": True}
        if "chat" in url.path:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        data = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        made.append(head.encode() + data)
    return made


class Connection(asyncio.Protocol):
    """One connection in a closed loop."""

    def __init__(self, load: HttpLoad) -> None:
        self.load = load
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.fire()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.load.ended:
            self.load.error("connection lost")

    def fire(self) -> None:
        if self.load.ended:
            self.transport.close()
            return
        self.buffer, self.head, self.first, self.num_events = b"", b"", 0.0, 0
        self.left, self.chunked = 0, False
        self.sent = time.perf_counter()
        self.transport.write(self.load.next_request())

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.buffer += data
        if not self.head:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.head = self.buffer[:end].lower()
            self.buffer = self.buffer[end + 4 :]
            self.chunked = b"transfer-encoding: chunked" in self.head
            found = re.search(rb"content-length: *(\d+)", self.head)
            self.left = int(found.group(1)) if found else 0
        if self.buffer and not self.first:
            self.first = now
        if self.chunked:
            if self.buffer.endswith(b"0\r\n\r\n"):
                self.finish(now)
        elif len(self.buffer) >= self.left:
            self.finish(now)

    def finish(self, now: float) -> None:
        load = self.load
        status = int(self.head[9:12])
        found = _USAGE.findall(self.buffer)
        if load.options.count == "usage":
            tokens = int(found[-1]) if found else 0
        else:
            tokens = self.buffer.count(b'data: {"') if load.options.stream else load.options.tokens
        if status != 200:
            load.error(str(status))
        elif tokens != load.options.tokens and load.options.count == "usage":
            load.error(f"{tokens} tokens")
        elif load.measuring:
            load.latencies.append(now - self.sent)
            load.first_latencies.append(self.first - self.sent)
            load.num_tokens += tokens
        if load.ended:
            self.transport.close()
        elif load.options.pause_ms:
            pause_s = load.options.pause_ms / 1e3 * random.uniform(0.5, 1.5)
            asyncio.get_running_loop().call_later(pause_s, self.fire)
        else:
            self.fire()


class HttpLoad:
    """All connections of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.url = urllib.parse.urlsplit(options.url)
        self.pool = make_pool(options, self.url)
        self.number = 0
        self.latencies: list[float] = []
        self.first_latencies: list[float] = []
        self.num_tokens = 0
        self.errors: dict[str, int] = {}
        self.measuring = False
        self.ended = False

    def next_request(self) -> bytes:
        self.number += 1
        return self.pool[self.number % len(self.pool)]

    def error(self, what: str) -> None:
        self.errors[what] = self.errors.get(what, 0) + 1

    async def run(self) -> dict[str, object]:
        loop = asyncio.get_running_loop()
        for _ in range(self.options.concurrency):
            await loop.create_connection(lambda: Connection(self), self.url.hostname, self.url.port)
        await asyncio.sleep(self.options.warm)
        self.measuring, start = True, time.perf_counter()
        await asyncio.sleep(self.options.seconds)
        self.measuring, span = False, time.perf_counter() - start
        self.ended = True
        return {
            "requests": len(self.latencies),
            "requests_s": round(len(self.latencies) / span, 1),
            "tokens_s": round(self.num_tokens / span, 1),
            "p50_ms": percentile(self.latencies, 0.5),
            "p99_ms": percentile(self.latencies, 0.99),
            "ttft_p50_ms": percentile(self.first_latencies, 0.5),
            "errors": self.errors,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warm", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--count", choices=("usage", "events"), default="usage")
    parser.add_argument("--pause-ms", type=float, default=0, help="mean, before the next request")
    add_prompt_flags(parser)
    options = parser.parse_args()
    if not is_loopback(urllib.parse.urlsplit(options.url).hostname or ""):
        raise ConfigError("load is sent to loopback addresses only")

    async def run() -> dict[str, object]:
        return await HttpLoad(options).run()

    print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
