"""What a step costs the master: schedule, update, encode the plan, decode the result.

    python -m benchmarks.scheduling [--running 256] [--churn 0.02] [--steps 600] [--profile]
        [--strategies chunked,...]

The real scheduler and codec, in one process, with slots as a CPU's worker has them; a stand-in for
the worker makes results (untimed), whose times follow what a step computes, so that the model of
step times is refitted as it would be. So many sequences run, and each step a share of them ends
while as many arrive. Prints medians and 99th percentiles in microseconds, without and with the
asynchronous pipeline, for each strategy, of processor time; `learn`, a part of `update`, is the
model of step times.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import pstats
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from xllm.config.scheduling import STRATEGIES, SchedulerSettings
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.policy import SchedulingPolicy, build_policy
from xllm.master.strategies.step_model import StepShape
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import StepPlan, StepResult, WorkerMessage

MAX_MAPPINGS = 60_000  # what Linux leaves a worker by default
PARTS = ("schedule", "encode", "decode", "update")
LEARN = "learn"
TARGET_US = 2000.0


class TimedPolicy(SchedulingPolicy):
    """A policy that knows how long it learnt."""

    learn_s = 0.0

    def learn(self, plan: StepPlan, num_decodes: int, seconds: float) -> None:
        """Timed."""
        began = time.thread_time()
        super().learn(plan, num_decodes, seconds)
        self.learn_s += time.thread_time() - began


def timed_policy(strategy: str) -> TimedPolicy:
    """The policy of a strategy, else by default settings."""
    policy = build_policy(SchedulerSettings(strategy=strategy))
    return TimedPolicy(
        **{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    )


def step_ns(plan: StepPlan) -> int:
    """What a step takes on a machine that does a token in 0.2 ms."""
    shape = StepShape.of(plan)
    return round(1e6 * (5 + 0.2 * shape.tokens + 2e-4 * shape.context + 1e-6 * shape.pairs))


class Load:
    """A scheduler with `running` sequences, of which `churn` end and begin in each step."""

    def __init__(
        self, running: int, churn: float, prompt: int, max_in_flight: int, strategy: str
    ) -> None:
        self._rng = random.Random(1)
        self._life = max(2, round(1 / churn))
        self._prompt = prompt
        self._churn = max(1, round(running * churn))
        size, limit = 16, prompt + 2 * self._life
        self._root = root_hash("benchmark")
        self.limits = InstanceLimits(
            model="",
            num_blocks=2 * running * (limit // size + 2),
            block_size=size,
            max_model_len=8192,
            vocab_size=32000,
            max_num_seqs=2 * running,
            max_num_batched_tokens=8192,
            max_in_flight=max_in_flight,
            num_slots=4 * running,
            max_mappings=MAX_MAPPINGS,
        )
        self.policy = timed_policy(strategy)
        self.scheduler = Scheduler(self.limits, self.policy)
        self._decoder: Decoder[WorkerMessage] = Decoder(WorkerMessage)
        self._in_flight: deque[tuple[StepPlan, bytes]] = deque()
        self._num_admitted = 0
        self.times: dict[str, list[float]] = {part: [] for part in (*PARTS, LEARN)}
        self.num_running: list[int] = []
        # The first ones end at staggered times, as in a system that has been running for long.
        for index in range(running):
            self._admit(2 + index * self._life // running)

    def step(self, now: float) -> None:
        """One turn of the master's loop: new requests, plans, the oldest result."""
        for _ in range(self._churn):
            self._admit(self._life)
        spent = dict.fromkeys(PARTS, 0.0)
        while (plan := self._timed(spent, "schedule", self.scheduler.schedule, now)) is not None:
            self._timed(spent, "encode", encode, plan)
            tokens = tuple((17,) if item.num_samples else () for item in plan.items)
            self._in_flight.append((plan, encode(StepResult(plan.step, tokens, step_ns(plan)))))
        _, body = self._in_flight.popleft()
        result = self._timed(spent, "decode", self._decoder.decode, body)
        self.policy.learn_s = 0.0
        self._timed(spent, "update", self.scheduler.update, result, (), now)
        spent[LEARN] = self.policy.learn_s
        for part, seconds in spent.items():
            self.times[part].append(seconds)
        self.num_running.append(self.scheduler.statistics().num_running)

    def _timed(
        self, spent: dict[str, float], part: str, call: Callable[..., Any], *args: Any
    ) -> Any:
        began = time.thread_time()
        value = call(*args)
        spent[part] += time.thread_time() - began
        return value

    def _admit(self, max_tokens: int) -> None:
        prompt = tuple(self._rng.randrange(32000) for _ in range(self._prompt))
        hashes = chain_hashes(self._root, prompt, self.limits.block_size)
        sampling = SamplingParams(seed=1, max_tokens=max_tokens)
        self._num_admitted += 1
        refusal = self.scheduler.admit(
            AdmitRequest(
                f"r{self._num_admitted}", 1, "", prompt, sampling, hashes, salt=self._root
            ),
            0.0,
        )
        assert refusal is None, refusal


def measure(
    running: int,
    churn: float,
    prompt: int,
    steps: int,
    max_in_flight: int,
    strategy: str = STRATEGIES[0],
) -> dict[str, Any]:
    """Medians and 99th percentiles of a step's parts and their sum, microseconds."""
    load = Load(running, churn, prompt, max_in_flight, strategy)
    warm_up = round(2 / churn)
    for number in range(warm_up + steps):
        load.step(0.01 * number)
    columns = {part: times[warm_up:] for part, times in load.times.items()}
    columns["total"] = [sum(p) for p in zip(*(columns[part] for part in PARTS), strict=True)]
    found = load.num_running[warm_up:]
    report: dict[str, Any] = {"running": sum(found) / len(found)}
    for name, times in columns.items():
        ordered = sorted(times)
        report[name] = {
            "median_us": 1e6 * ordered[len(ordered) // 2],
            "p99_us": 1e6 * ordered[99 * len(ordered) // 100],
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--churn", type=float, default=0.02)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    load = (options.running, options.churn, options.prompt, options.steps)
    reports = {
        strategy: {name: measure(*load, depth, strategy) for name, depth in (("off", 1), ("on", 2))}
        for strategy in options.strategies.split(",")
    }
    if options.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if options.json:
        print(json.dumps(reports))
        return
    for strategy, report in reports.items():
        for name, rows in report.items():
            print(f"{strategy}, pipeline {name}: {rows['running']:.0f} running")
            for part in (*PARTS, LEARN, "total"):
                row = rows[part]
                print(f"  {part:<9} {row['median_us']:8.0f} us   p99 {row['p99_us']:8.0f} us")
    print(f"target of the totals' medians {TARGET_US:.0f} us")


if __name__ == "__main__":
    main()
