"""Closed-loop load over ZeroMQ: request and token rates, latency percentiles.

    python -m benchmarks.load_zmq --endpoint tcp://127.0.0.1:8011 --concurrency 64 --seconds 5
                                  [--tokens 1] [--hold-ms 20] [--prompt-chars 512] [--batch]

Each of `--concurrency` requests in flight is followed by the next as soon as its terminal
message is there. Prints one line of JSON. Loopback only. Every token is counted by index: a
lost, double or foreign one is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time

import uvloop

from xllm.errors import ConfigError
from xllm.protocol.client import (
    RequestFinished,
    RouterMessage,
    SubmitRequest,
    TokenDelta,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.endpoint import is_local

WORDS = ["alpha", "beta", "gamma", "delta", "token", "cache", "batch", "model", "page", "queue"]
POOL_SIZE = 16_384
"""Different prompts: more than any cache of encoded texts holds."""


def prompts(num_chars: int, shared_chars: int) -> list[str]:
    """A pool of prompts of `num_chars` characters of which the first are the same in all."""

    def text(count: int, seed: int) -> str:
        words = random.Random(seed).choices(WORDS, k=count // 5 + 1)
        return " ".join(words)[:count]

    shared = text(shared_chars, 0)
    return [shared + text(num_chars - shared_chars, 1 + i) for i in range(POOL_SIZE)]


class Load:
    """One generator: keeps `concurrency` requests in flight until the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pool = prompts(options.prompt_chars, min(options.shared_chars, options.prompt_chars))
        self.sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
        self.next_id = 0
        self.sent_at: dict[int, float] = {}
        self.first_at: dict[int, float] = {}
        self.received: dict[int, int] = {}
        self.latencies: list[float] = []
        self.first_latencies: list[float] = []
        self.errors: dict[str, int] = {}
        self.num_tokens = 0
        self.num_deltas = 0
        self.measuring = False
        self.ended = False
        self.drained = asyncio.Event()

    def submit(self) -> None:
        self.next_id += 1
        number = self.next_id
        self.sent_at[number] = time.perf_counter()
        self.received[number] = 0
        self.socket.send(
            SubmitRequest(
                id=number,
                prompt=self.pool[number % POOL_SIZE],
                sampling=self.sampling,
                stream=not self.options.batch,
                hold_ms=self.options.hold_ms,
            )
        )

    def on_message(self, message: RouterMessage, frames: list[bytes]) -> None:
        kind = type(message)
        if kind is TokenDelta:
            self.num_deltas += self.measuring
            count = len(message.token_ids)
            got = self.received[message.id]
            if message.first_index != got:
                self.error("tokens out of order")
            if not got:
                self.first_at[message.id] = time.perf_counter()
            self.received[message.id] = got + count
            if self.measuring:
                self.num_tokens += count
            return
        self.end(message)

    def end(self, message: RouterMessage) -> None:
        now = time.perf_counter()
        number = message.id
        sent = self.sent_at.pop(number)
        got = self.received.pop(number)
        first = self.first_at.pop(number, now)
        if not isinstance(message, RequestFinished):
            self.error(getattr(message, "code", type(message).__name__))
        else:
            if self.options.batch:
                got = len(message.choices[0].token_ids)
                self.num_tokens += got if self.measuring else 0
            if got != self.options.tokens:
                self.error(f"{got} tokens")
            if self.measuring:
                self.latencies.append(now - sent)
                self.first_latencies.append(first - sent)
        if not self.ended:
            self.submit()
        elif not self.sent_at:
            self.drained.set()

    def error(self, what: str) -> None:
        self.errors[what] = self.errors.get(what, 0) + 1

    async def run(self) -> dict[str, object]:
        transport = Transport()
        self.socket: DealerSocket[RouterMessage] = DealerSocket(
            transport, self.options.endpoint, Decoder(RouterMessage), self.on_message
        )
        for _ in range(self.options.concurrency):
            self.submit()
        await asyncio.sleep(self.options.warm)
        self.measuring, start = True, time.perf_counter()
        await asyncio.sleep(self.options.seconds)
        self.measuring, span = False, time.perf_counter() - start
        self.ended = True
        async with asyncio.timeout(60):
            await self.drained.wait()
        self.socket.close()
        transport.close()
        return {
            "requests": len(self.latencies),
            "requests_s": round(len(self.latencies) / span, 1),
            "tokens_s": round(self.num_tokens / span, 1),
            "deltas_s": round(self.num_deltas / span, 1),
            "p50_ms": percentile(self.latencies, 0.5),
            "p99_ms": percentile(self.latencies, 0.99),
            "ttft_p50_ms": percentile(self.first_latencies, 0.5),
            "errors": self.errors,
        }


def percentile(values: list[float], q: float) -> float:
    """In milliseconds; 0 of nothing."""
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3) if ordered else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warm", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hold-ms", type=int, default=20)
    parser.add_argument("--prompt-chars", type=int, default=512)
    parser.add_argument("--shared-chars", type=int, default=256)
    parser.add_argument("--batch", action="store_true", help="one terminal message, no deltas")
    options = parser.parse_args()
    if not is_local(options.endpoint):
        raise ConfigError("load is sent to loopback addresses only")

    async def run() -> dict[str, object]:
        return await Load(options).run()

    print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
