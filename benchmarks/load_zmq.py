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
from typing import Any

import uvloop

from benchmarks.texts import prompts
from xllm.errors import ConfigError
from xllm.protocol.client import RouterMessage
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.generation import RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.endpoint import is_local

POOL_SIZE = 32_768
"""Different prompts: more than are asked in a run. Those of another run are others, so that
nothing that a router remembers of texts helps it."""


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked."""
    parser.add_argument("--prompt-chars", type=int, default=512)
    parser.add_argument("--shared-chars", type=int, default=256)
    parser.add_argument("--prompt-ids", type=int, default=0, help="so many ids in place of a text")
    parser.add_argument("--vocab-size", type=int, default=1024, help="ids are below")
    parser.add_argument("--pool", type=int, default=POOL_SIZE, help="different prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; 0: others each time")


def prompt_pool(options: argparse.Namespace) -> list[Any]:
    """The prompts of a run: texts, or lists of ids of which the first half is the same in all."""
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 40)
    if not options.prompt_ids:
        shared_chars = min(options.shared_chars, options.prompt_chars)
        return prompts(options.prompt_chars, shared_chars, options.pool, seed)
    half = options.prompt_ids // 2
    some = random.Random(seed)
    shared = some.choices(range(options.vocab_size), k=half)
    rest = options.prompt_ids - half
    return [shared + some.choices(range(options.vocab_size), k=rest) for _ in range(options.pool)]


class Load:
    """One generator: keeps `concurrency` requests in flight until the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        sampling = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
        # Encoded once: the generator shares the machine with what it measures.
        self.pool = [
            encode(
                SubmitRequest(
                    id=number,
                    prompt=None if options.prompt_ids else prompt,
                    packed_prompt=pack_tokens(prompt) if options.prompt_ids else b"",
                    sampling=sampling,
                    stream=not options.batch,
                    hold_ms=options.hold_ms,
                )
            )
            for number, prompt in enumerate(prompt_pool(options))
        ]
        self.sockets: list[DealerSocket[RouterMessage]] = []
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
        number = self.next_id % len(self.pool)
        while number in self.sent_at:  # it is still open
            number = (number + 1) % len(self.pool)
        self.sent_at[number] = time.perf_counter()
        self.received[number] = 0
        self.sockets[self.next_id % len(self.sockets)].send_encoded(self.pool[number])

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
        self.sockets = [
            DealerSocket(transport, endpoint, Decoder(RouterMessage), self.on_message)
            for endpoint in self.options.endpoint.split(",")
        ]
        for _ in range(self.options.concurrency):
            self.submit()
        await asyncio.sleep(self.options.warm)
        self.measuring, start = True, time.perf_counter()
        await asyncio.sleep(self.options.seconds)
        self.measuring, span = False, time.perf_counter() - start
        self.ended = True
        async with asyncio.timeout(60):
            await self.drained.wait()
        for socket in self.sockets:
            socket.close()
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
    parser.add_argument("--endpoint", required=True, help="or several, with commas")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warm", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hold-ms", type=int, default=20)
    add_prompt_flags(parser)
    parser.add_argument("--batch", action="store_true", help="one terminal message, no deltas")
    options = parser.parse_args()
    if not all(map(is_local, options.endpoint.split(","))):
        raise ConfigError("load is sent to loopback addresses only")

    async def run() -> dict[str, object]:
        return await Load(options).run()

    print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
