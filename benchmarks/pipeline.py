"""What the asynchronous pipeline gains: output tokens a second with it over without it.

    python -m benchmarks.pipeline [--shapes demo,50m,0.6b | --model DIR | --toy-ms MS]
        [--repetitions 7] [--json]

A master in this process and its worker in another, once with the pipeline and once without, both
up for the whole run; they take turns, so that a change of the machine's speed meets both. The load
is that of W2: 16 requests at once, 128 tokens in and 64 out, greedy. Prints medians of tokens a
second, the ratio, and the share of the time between first and last step in which the worker was
idle while there was work. Then requests of one token each come at random times into 15 that
decode: how long such a newcomer waits for its token, with and without. Shapes other than the demo
model's are models of random weights (`benchmarks.random_model`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any

import msgspec
import uvloop

from benchmarks.context import context_length
from benchmarks.peer_hosts import Clocks, EngineHost, Requests
from benchmarks.random_model import SHAPES, write_random_model
from xllm.cli.model_source import demo_model_path
from xllm.config.environment import prepare_environment
from xllm.config.load import load
from xllm.master.scheduler import Scheduler
from xllm.protocol.instance import AdmitRequest, InstanceReply, TokenBatch
from xllm.protocol.sampling import SamplingParams

NUM_REQUESTS, PROMPT, OUTPUT = 16, 128, 64
DEMO = "demo"
NUM_NEWCOMERS = 24
NEWCOMER_OUTPUT = 4 * OUTPUT
"""How long the others decode: steps enough for the newcomers."""
KV_BYTES = 1 << 30
WORST_IDLE = 0.02
"""The share of the time that the worker may be idle with the pipeline."""


def engine_settings(options: argparse.Namespace, pipelined: bool) -> dict[str, str]:
    """What to load, by setting."""
    settings = {
        "model.dtype": options.dtype,
        "worker.num_threads": str(options.threads),
        "worker.kv_cache_bytes": str(KV_BYTES),
        "scheduler.async_scheduling": str(pipelined).lower(),
        "cluster.log_level": "warning",
    }
    if options.toy_ms is not None:
        settings |= {"worker.engine": "toy", "worker.toy_step_ms": str(options.toy_ms)}
        settings |= {"model.name": "toy", "worker.toy_num_blocks": "8192"}
        settings |= {"model.max_model_len": "2048"}
    else:
        path = options.model or demo_model_path()
        settings |= {"model.path": str(pathlib.Path(path).resolve())}
        settings |= {"model.name": pathlib.Path(path).resolve().name}
        settings |= {"model.max_model_len": context_length(path)}
    return settings


class PipelineHost(EngineHost):
    """An EngineHost whose scheduler can be looked at, and that takes a request beside a run."""

    _newcomer: asyncio.Future[None] | None = None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of its master."""
        scheduler = self._master.models[0].steps.scheduler
        assert scheduler is not None
        return scheduler

    async def wait_for_one(self, prompt: list[int]) -> None:
        """A request for one token, to its end."""
        self._newcomer = asyncio.get_running_loop().create_future()
        self._serial += 1
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=0)
        name = self._settings.model.name
        self._socket.send(AdmitRequest(f"new-{self._serial}", 1, name, tuple(prompt), sampling))
        await self._newcomer

    def _take(self, message: InstanceReply, frames: list[bytes]) -> None:
        if isinstance(message, TokenBatch) and self._newcomer is not None:
            own = [item for item in message.items if item.request_id.startswith("new-")]
            if own:
                self._newcomer.set_result(None)
                self._newcomer = None
        if isinstance(message, TokenBatch):
            items = tuple(i for i in message.items if not i.request_id.startswith("new-"))
            ended = tuple(e for e in message.ended if not e.request_id.startswith("new-"))
            if not items and not ended:
                return
            message = msgspec.structs.replace(message, items=items, ended=ended)
        super()._take(message, frames)


def w2_like(rng: random.Random, vocab_size: int) -> Requests:
    """16 prompts that have nothing in common."""
    return [
        ([rng.randrange(3, vocab_size) for _ in range(PROMPT)], OUTPUT) for _ in range(NUM_REQUESTS)
    ]


async def repetition(host: PipelineHost, requests: Requests) -> dict[str, float]:
    """Output tokens a second and the worker's idle share of one run of the load."""
    before = host.scheduler.statistics()
    clocks: Clocks = await host.run(requests)
    after = host.scheduler.statistics()
    busy = after.worker_busy_s - before.worker_busy_s
    idle = after.worker_idle_s - before.worker_idle_s
    seconds = max(clocks.last.values()) - clocks.start
    return {
        "tok_s": sum(clocks.counts.values()) / seconds,
        "idle": idle / (busy + idle),
        "ttft_ms": 1e3 * statistics.fmean(at - clocks.start for at in clocks.first.values()),
    }


async def newcomers(host: PipelineHost, rng: random.Random, vocab_size: int) -> list[float]:
    """Milliseconds until the only token of short requests that come while 15 others decode."""
    prompts = w2_like(rng, vocab_size)[1:]
    waits = []
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.run([(ids, NEWCOMER_OUTPUT) for ids, _ in prompts]))
        await asyncio.sleep(0.2)
        for _ in range(NUM_NEWCOMERS):
            await asyncio.sleep(rng.uniform(0.005, 0.03))
            if running.done():
                break
            began = time.perf_counter()
            await host.wait_for_one([rng.randrange(3, vocab_size) for _ in range(8)])
            waits.append(1e3 * (time.perf_counter() - began))
    return waits


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All repetitions of both, in turns."""
    async with contextlib.AsyncExitStack() as stack:
        hosts = {}
        for name in ("off", "on"):
            host = hosts[name] = PipelineHost(load(engine_settings(options, name == "on")))
            await host.open()
            stack.push_async_callback(host.close)
        vocab_size = hosts["on"].scheduler.limits.vocab_size
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in hosts}
        waits: dict[str, list[float]] = {name: [] for name in hosts}
        for number in range(options.repetitions + 1):
            order = ("off", "on") if number % 2 else ("on", "off")
            for name in order:
                rng = random.Random(number)
                row = await repetition(hosts[name], w2_like(rng, vocab_size))
                if number:  # the first one warms up
                    rows[name].append(row)
        for name in ("off", "on", "on", "off"):
            waits[name] += await newcomers(hosts[name], random.Random(name), vocab_size)
    report: dict[str, Any] = {"repetitions": options.repetitions}
    for name in rows:
        report[name] = {
            key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]
        }
        report[name]["newcomer_ms"] = statistics.fmean(waits[name]) if waits[name] else None
    pairs = zip(rows["on"], rows["off"], strict=True)
    report["ratio"] = statistics.median(on["tok_s"] / off["tok_s"] for on, off in pairs)
    return report


def measure_shapes(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Reports by shape, one after the other; of `--model` or `--toy-ms` just that one."""
    if options.model or options.toy_ms is not None:
        return {pathlib.Path(options.model).name or "toy": _run(options)}
    reports = {}
    with tempfile.TemporaryDirectory(prefix="xllm-pipeline-") as directory:
        for shape in options.shapes.split(","):
            path = ""
            if shape != DEMO:
                path = str(write_random_model(SHAPES[shape], pathlib.Path(directory) / shape))
            reports[shape] = _run(argparse.Namespace(**{**vars(options), "model": path}))
    return reports


def _run(options: argparse.Namespace) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(options))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=DEMO, help=f"of {DEMO}, {', '.join(SHAPES)}")
    parser.add_argument("--model", default="")
    parser.add_argument("--toy-ms", type=float, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    unknown = set(options.shapes.split(",")) - {DEMO, *SHAPES}
    if unknown:
        parser.error(f"--shapes: {', '.join(sorted(unknown))} is none of {DEMO}, {list(SHAPES)}")
    return options


def main() -> None:
    """Measure and print."""
    prepare_environment()
    options = parse()
    reports = measure_shapes(options)
    if options.json:
        print(json.dumps(reports))
        return
    for shape, report in reports.items():
        for name in ("off", "on"):
            row = report[name]
            print(
                f"{shape:<5} pipeline {name:<4} {row['tok_s']:9.1f} tok/s   "
                f"idle {100 * row['idle']:5.2f}%   TTFT {row['ttft_ms']:7.1f} ms   "
                f"newcomer {row['newcomer_ms'] or 0:7.1f} ms"
            )
        within = "within" if report["on"]["idle"] <= WORST_IDLE else "above"
        print(f"{shape:<5} ratio on/off  {report['ratio']:.3f}, idle {within} {WORST_IDLE:.0%}")


if __name__ == "__main__":
    main()
