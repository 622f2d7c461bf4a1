"""Cache-aware routing against routing by load and by chance, on prompts that share beginnings.

    python -m benchmarks.routing [--json] [--instances 8] [--fill 0.4,0.75] [--rate 45]
        [--seconds 20] [--policies prefix-aware,least-load,random] [--quick]

For each policy and each fill, a service of toy instances is started on this machine. Their prefill
takes `--token-us` for each token that is not cached, and their steps `--step-ms`, asleep, so that
what differs is where requests go and not how fast this machine computes. Prompts belong to groups;
those of a group begin with the same tokens. The beginnings of all groups together are `fill` of
the tokens that all instances can hold: they all fit once, and not at each instance. Requests come
at `--rate` a second, at random times and of random groups, the same for each policy, whether
earlier ones have ended or not. Before that each group is asked once, a request an instance at a
time, so that what is measured begins with full caches.

Prints hit rate (cached of all prompt tokens, as instances counted them), TTFT p50 and p90, and new
tokens a second until the last request has ended. All policies together take about 5 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import shlex
import sys
import tempfile
import time
from typing import Any

from benchmarks.load_zmq import percentile
from xllm.cli.local_service import local_service
from xllm.protocol.client import RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

BLOCK = 16
FIRST_ID, NUM_IDS = 16, 900
END_S = 120.0
"""If no request ends for so long the run fails."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts by group, and when each is asked."""

    prompts: list[tuple[int, ...]]
    times: list[float]
    """Seconds from the begin; those of the first `num_groups` prompts, one a group, are 0."""
    num_groups: int


def make_workload(options: argparse.Namespace, fill: float, seed: int) -> Workload:
    """The same for each policy."""
    some = random.Random(seed)
    capacity = options.instances * options.blocks * BLOCK
    num_groups = max(1, int(fill * capacity / options.prefix))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(some.choices(range(FIRST_ID, FIRST_ID + NUM_IDS), k=count))

    prefixes = [ids(options.prefix) for _ in range(num_groups)]
    prompts = [prefix + ids(options.suffix) for prefix in prefixes]
    times, now = [0.0] * num_groups, 0.0
    while (now := now + some.expovariate(options.rate)) < options.seconds:
        prompts.append(some.choice(prefixes) + ids(options.suffix))
        times.append(now)
    return Workload(prompts, times, num_groups)


class Run:
    """Asks one workload of one service, and keeps what came of it."""

    def __init__(self, endpoint: str, workload: Workload, num_tokens: int) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._sent: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._finished: dict[int, RequestFinished] = {}
        self._errors: dict[str, int] = {}
        self._last_at = 0.0
        self._ended = asyncio.Event()

    async def ask_all(self, at_once: int) -> None:
        """Submit all; returns when they have ended. `at_once`: requests in flight of those that
        fill the caches."""
        transport = Transport()
        socket = DealerSocket(transport, self._endpoint, Decoder(RouterMessage), self._on_message)
        begin = 0.0
        for number, (prompt, at) in enumerate(
            zip(self._workload.prompts, self._workload.times, strict=True)
        ):
            if number < self._workload.num_groups:
                await self._wait_open(at_once)
            else:
                if not begin:
                    await self._wait_open(1)
                    begin = time.perf_counter()
                await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            self._sent[number] = time.perf_counter()
            socket.send(SubmitRequest(id=number, prompt=prompt, sampling=self._sampling, hold_ms=0))
        await self._wait_open(1)
        socket.close()
        transport.close()

    async def _wait_open(self, fewer_than: int) -> None:
        while len(self._sent) - self._num_ended >= fewer_than:
            self._ended.clear()
            await asyncio.wait_for(self._ended.wait(), END_S)

    @property
    def _num_ended(self) -> int:
        return len(self._finished) + sum(self._errors.values())

    def _on_message(self, message: RouterMessage, frames: list[bytes]) -> None:
        now = time.perf_counter()
        if isinstance(message, TokenDelta):
            self._first.setdefault(message.id, now)
            return
        if isinstance(message, RequestFinished):
            self._finished[message.id] = message
        else:
            self._error(getattr(message, "code", type(message).__name__))
        self._last_at = now
        self._ended.set()

    def _error(self, what: str) -> None:
        self._errors[what] = self._errors.get(what, 0) + 1

    def figures(self) -> dict[str, Any]:
        """Of the requests behind those that filled the caches."""
        counted = range(self._workload.num_groups, len(self._workload.prompts))
        done = [number for number in counted if number in self._finished]
        usages = [self._finished[number].usage for number in done]
        waits = [self._first[number] - self._sent[number] for number in done]
        span = self._last_at - self._sent[counted[0]]
        prompt_tokens = sum(one.prompt_tokens for one in usages)
        return {
            "requests": len(done),
            "groups": self._workload.num_groups,
            "hit_rate": round(sum(one.cached_tokens for one in usages) / max(1, prompt_tokens), 4),
            "ttft_p50_ms": percentile(waits, 0.5),
            "ttft_p90_ms": percentile(waits, 0.9),
            "tokens_s": round(sum(one.completion_tokens for one in usages) / span, 1),
            "requests_s": round(len(done) / span, 2),
            "errors": self._errors,
        }


def serve_flags(options: argparse.Namespace, policy: str, run_dir: str) -> list[str]:
    """How a service is started for one policy."""
    flags = {
        "--instances": options.instances,
        "--worker-engine": "toy",
        "--worker-toy-num-blocks": options.blocks,
        "--worker-block-size": BLOCK,
        "--worker-toy-token-us": options.token_us,
        "--worker-toy-step-ms": options.step_ms,
        "--router-policy": policy,
        "--cluster-run-dir": run_dir,
        "--cluster-log-level": "error",
    }
    named = [str(part) for pair in flags.items() for part in pair]
    return [*named, "--no-serve-kvcache", *shlex.split(options.serve)]


def measure(options: argparse.Namespace, policy: str, fill: float) -> dict[str, Any]:
    """One service, one workload."""
    workload = make_workload(options, fill, options.seed)
    with (
        tempfile.TemporaryDirectory(prefix="xr-") as run_dir,
        local_service(serve_flags(options, policy, run_dir)) as service,
    ):
        run = Run(service.zmq, workload, options.tokens)
        asyncio.run(run.ask_all(options.instances))
    return {"policy": policy, "fill": fill, **run.figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--policies", default="prefix-aware,least-load,random")
    parser.add_argument("--fill", default="0.4,0.75", help="of all instances' cache")
    parser.add_argument("--rate", type=float, default=45.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--blocks", type=int, default=512, help="of an instance")
    parser.add_argument("--prefix", type=int, default=512, help="tokens that a group shares")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of a prompt's own")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a request")
    parser.add_argument("--token-us", type=float, default=400.0, help="time of a computed token")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--serve", default="", help="further flags of xllm serve")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="4 instances, 6 seconds, one fill")
    options = parser.parse_args()
    if options.quick:
        options.instances, options.seconds, options.fill = 4, 6.0, "0.75"
        options.rate /= 2
    results = []
    for fill in map(float, options.fill.split(",")):
        for policy in options.policies.split(","):
            results.append(measure(options, policy, fill))
            if not options.json:
                print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    if options.json:
        print(json.dumps({"settings": vars(options), "results": results}))
    if any(one["errors"] for one in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
