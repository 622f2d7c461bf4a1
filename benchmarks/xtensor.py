"""Slots against block tables, in one run: memory, waits for mappings, attention, speed.

    python -m benchmarks.xtensor [--model DIR] [--repetitions 5] [--workloads W2,W3,W4] [--json]

Scheduler and worker in this process, two plans under way as in a service; the same model twice:
once reading a sequence's KV in its slot (xTensor), once by block tables. Both are loaded for the
whole run and take turns, so that a change of the machine's speed meets both. The loads are the
peers' (`benchmarks/workloads.py`): 16 requests at once, 32 of mixed lengths, 24 with a common
beginning. What contiguous allocation would take, the longest sequence reserved for everybody who
runs, is computed, not measured. Then the attention kernel alone, over the model's heads
(`benchmarks/slot_attention.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.slot_attention import CASES, Case, attention_report, print_attention
from xllm.cli.bench.local_engine import LocalEngine, LocalRequest, StepObserver
from xllm.cli.bench.measures import RequestRecord
from xllm.cli.model_source import demo_model_path
from xllm.config.environment import prepare_environment
from xllm.config.load import load
from xllm.config.settings import Settings
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler, SchedulerStatistics
from xllm.protocol.step import ItemKind, StepPlan
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.executor import Executor, StepOutput
from xllm.worker.kernels.structures import PHASES

ARMS = ("xtensor", "paged")
_ATTENTION = PHASES.index("attention")
_ENTRY_BYTES = 8
"""Of a page of the machine in the kernel's page tables."""


def arm_settings(options: argparse.Namespace, kv_memory: str) -> Settings:
    """What to load."""
    path = Path(options.model or demo_model_path()).resolve()
    return load(
        {
            "model.path": str(path),
            "model.name": path.name,
            "model.dtype": options.dtype,
            "model.max_model_len": str(options.max_model_len),
            "worker.num_threads": str(options.threads),
            "worker.kv_cache_bytes": str(options.kv_mib << 20),
            "worker.kv_memory": kv_memory,
            "cluster.log_level": "warning",
        }
    )


class WatchedEngine(LocalEngine):
    """A LocalEngine whose scheduler can be looked at, with two plans under way as in a service:
    a thread executes them, and the second one arrives while the first one runs."""

    def __init__(
        self, settings: Settings, executor: Executor, progress: Callable[[int, int], None]
    ) -> None:
        super().__init__(settings, executor, progress)
        self._peaks: dict[str, float] = {"blocks": 0, "running": 0}
        self._scheduler = Scheduler(InstanceLimits.from_ready(self.ready, settings.scheduler))

    def run(
        self,
        requests: Sequence[LocalRequest],
        ended: Callable[[RequestRecord], None] = lambda record: None,
        stepped: StepObserver = lambda plan, took_s: None,
    ) -> list[RequestRecord]:
        """See LocalEngine. `stepped` is called on the thread that executes."""
        self._start = time.perf_counter()
        records = []
        for index, (prompt, count) in enumerate(requests):
            records.append(RequestRecord(index, 0.0, self._clock(), num_prompt=len(prompt)))
            self._admit(prompt, count, records[-1], ended)

        def execute(plan: StepPlan) -> StepOutput:
            began = time.perf_counter()
            output = self._executor.execute(plan)
            stepped(plan, time.perf_counter() - began)
            return output

        under_way: deque[Future[StepOutput]] = deque()
        with ThreadPoolExecutor(1) as thread:
            while self._open or under_way:
                self._take(self._scheduler.expire(time.monotonic()), ended)
                while (plan := self._scheduler.schedule(time.monotonic())) is not None:
                    self._executor.arrive(plan)
                    under_way.append(thread.submit(execute, plan))
                    self._note_peaks()
                output = under_way.popleft().result()
                outcome = self._scheduler.update(output.result, output.frames, time.monotonic())
                self._take(outcome, ended)
        return records

    @property
    def statistics(self) -> SchedulerStatistics:
        """Of its scheduler."""
        return self._scheduler.statistics()

    def take_peaks(self) -> dict[str, float]:
        """The most blocks that were held and sequences that ran since the last call."""
        peaks, self._peaks = self._peaks, {"blocks": 0, "running": 0}
        return peaks

    def _note_peaks(self) -> None:
        stats, peaks = self.statistics, self._peaks
        held = stats.num_blocks - stats.num_available_blocks
        peaks["blocks"] = max(peaks["blocks"], held)
        peaks["running"] = max(peaks["running"], stats.num_running)


class Arm:
    """One of the two engines; `runs` holds what each run showed, by workload."""

    def __init__(self, options: argparse.Namespace, kv_memory: str) -> None:
        self._settings = arm_settings(options, kv_memory)
        self._phase_ns = torch.zeros(len(PHASES), dtype=torch.int64)
        self._executor = NativeExecutor(self._settings, phase_ns=self._phase_ns)
        self.engine = WatchedEngine(self._settings, self._executor, lambda done, total: None)
        memory = self._executor.statistics().pool
        self.block_bytes = memory.total_bytes // memory.num_blocks
        self.runs: dict[str, list[dict[str, float]]] = {}

    def run(self, workload: str, repetition: int) -> None:
        """One run of a load; repetition 0 warms up and is not kept."""
        phases = {"prefill": [0.0, 0], "decode": [0.0, 0]}

        def stepped(plan: StepPlan, took_s: float) -> None:
            is_decode = all(item.kind == ItemKind.DECODE for item in plan.items)
            phase = phases["decode" if is_decode else "prefill"]
            phase[0] += int(self._phase_ns[_ATTENTION]) / 1e6
            phase[1] += 1
            self._phase_ns.zero_()

        self._phase_ns.zero_()
        self.engine.take_peaks()
        before = self._counters()
        requests = self._requests(workload, repetition)
        records = self.engine.run(requests, stepped=stepped)
        after = self._counters()
        if not repetition:
            return
        row = self._speed(records)
        for name, (spent_ms, steps) in phases.items():
            row[f"{name}_steps"] = steps
            row[f"{name}_attention_ms"] = spent_ms / steps if steps else 0.0
        row |= {f"peak_{name}": peak for name, peak in self.engine.take_peaks().items()}
        row |= {name: after[name] - before[name] for name in after}
        row |= self._mapped()
        self.runs.setdefault(workload, []).append(row)

    def _requests(self, workload: str, repetition: int) -> list[LocalRequest]:
        """The load, its ids folded into the model's vocabulary."""
        size = self.engine.ready.vocab_size - 3
        made = workloads.make(workload, repetition)
        return [(tuple(3 + token % size for token in ids), count) for ids, count in made]

    def _speed(self, records: list[RequestRecord]) -> dict[str, float]:
        for record in records:
            if record.error:
                raise RuntimeError(record.error)
        tpots = [tpot for record in records if (tpot := record.tpot_s) is not None]
        return {
            "tok_s": sum(r.num_output for r in records) / max(r.ended_s for r in records),
            "ttft_ms": 1e3 * statistics.fmean(r.ttft_s or 0.0 for r in records),
            "tpot_ms": 1e3 * statistics.fmean(tpots) if tpots else 0.0,
        }

    def _counters(self) -> dict[str, float]:
        """What only grows: of the worker's mapper and of the master's slots."""
        mapper, slots = self._executor.statistics().mapper, self.engine.statistics.slots
        if mapper is None or slots is None:
            return {}
        return {
            "steps_waited": mapper.num_steps_waited,
            "wait_ms": mapper.wait_ns / 1e6,
            "pages_ahead": mapper.num_ahead,
            "map_calls": mapper.slots.num_map_calls,
            "unmap_calls": mapper.slots.num_unmap_calls,
            "pages_mapped": mapper.slots.num_pages_mapped,
            "map_ms": mapper.slots.map_ns / 1e6,
            "pages_given": slots.num_pages,
            "pages_found": slots.num_pages_found,
        }

    def _mapped(self) -> dict[str, float]:
        """What is mapped now; under idle slots too."""
        mapper, slots = self._executor.statistics().mapper, self.engine.statistics.slots
        if mapper is None or slots is None:
            return {}
        return {"mappings": slots.num_mappings, "mapped_pages": mapper.slots.num_mapped_pages}


def summarize(arm: Arm, workload: str, max_model_len: int) -> dict[str, float]:
    """Medians of an arm's runs, and what follows from them."""
    runs = arm.runs[workload]
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    steps = row["prefill_steps"] + row["decode_steps"]
    ready = arm.engine.ready
    longest = -(-max_model_len // ready.block_size)
    row["steps"] = steps
    row["kv_mib"] = row["peak_blocks"] * arm.block_bytes / 2**20
    row["contiguous_mib"] = row["peak_running"] * longest * arm.block_bytes / 2**20
    if "steps_waited" in row:
        row["share_waited"] = row["steps_waited"] / steps
        row["share_found"] = row["pages_found"] / max(row["pages_given"], 1)
        entries = arm.block_bytes // mmap.PAGESIZE * _ENTRY_BYTES
        row["page_tables_mib"] = row["mapped_pages"] * entries / 2**20
        row["max_mappings"] = ready.max_mappings
    return row


def measure(options: argparse.Namespace, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """All repetitions of all loads, the arms in turns, then the attention of `cases` alone."""
    names = options.workloads.split(",")
    with contextlib.ExitStack() as stack:
        arms = {}
        for name in ARMS:
            arms[name] = Arm(options, name)
            stack.enter_context(arms[name].engine)
        if not arms["xtensor"].engine.ready.num_slots:
            raise RuntimeError("there are no slots here: nothing to compare")
        for workload in names:
            for repetition in range(options.repetitions + 1):
                for name in ARMS if repetition % 2 else reversed(ARMS):
                    arms[name].run(workload, repetition)
        report: dict[str, Any] = {"options": vars(options), "workloads": {}}
        for workload in names:
            report["workloads"][workload] = {
                name: summarize(arm, workload, options.max_model_len) for name, arm in arms.items()
            }
    settings = arm_settings(options, "xtensor")
    report["attention"] = attention_report(
        settings.model.path, options.dtype, options.threads, cases
    )
    return report


def print_workload(name: str, rows: dict[str, dict[str, float]]) -> None:
    """The table of one load: contiguous allocation, block tables, slots."""
    slots, paged = rows["xtensor"], rows["paged"]
    lines = [
        ("peak KV memory, MiB", f"{slots['contiguous_mib']:.1f}", "kv_mib", ".1f"),
        ("sequences at once", f"{slots['peak_running']:.0f}", "peak_running", ".0f"),
        ("tokens a second", "", "tok_s", ".1f"),
        ("TTFT ms", "", "ttft_ms", ".1f"),
        ("TPOT ms", "", "tpot_ms", ".2f"),
        ("attention ms a decode step", "", "decode_attention_ms", ".3f"),
        ("attention ms a step with prefill", "", "prefill_attention_ms", ".3f"),
    ]
    print(f"\n{name}: {slots['steps']:.0f} steps")
    print(f"{'':<34}{'contiguous':>12}{'block tables':>14}{'xTensor':>12}")
    for title, computed, key, form in lines:
        print(f"{title:<34}{computed:>12}{paged[key]:>14{form}}{slots[key]:>12{form}}")
    print(
        f"steps that waited for a map {100 * slots['share_waited']:.1f}%, "
        f"{slots['wait_ms']:.1f} ms in all; pages given {slots['pages_given']:.0f}, found mapped "
        f"{100 * slots['share_found']:.0f}%, mapped ahead {slots['pages_ahead']:.0f}; "
        f"{slots['map_calls']:.0f} calls for {slots['pages_mapped']:.0f} pages in "
        f"{slots['map_ms']:.1f} ms; mappings {slots['mappings']:.0f} of "
        f"{slots['max_mappings']:.0f}; page tables {slots['page_tables_mib']:.2f} MiB"
    )


def main() -> None:
    prepare_environment()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-mib", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workloads", default="W2,W3,W4")
    parser.add_argument("--json", action="store_true")
    report = measure(options := parser.parse_args())
    if options.json:
        print(json.dumps(report))
        return
    for name, rows in report["workloads"].items():
        print_workload(name, rows)
    print_attention(report["attention"])


if __name__ == "__main__":
    main()
