"""What Triton would compile for the steps of a service, and whether warming up has had it compiled.

    python -m tests.worker.triton_kernels.launch_keys DIRECTORY CASE ...

Triton compiles a kernel anew for each key: the types of its arguments, which of them are 1 or
multiples of 16 (pointers, too), and its constants. Here the engine loads a model, warms up and
launches steps of every shape; in the place of each launch its key is written down, made by
Triton's own code for a GPU that is not there. A process of its own: what the interpreter has
touched has no keys. Prints a JSON object a case.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.worker.device.batches import batch_of, table_of
from tests.worker.graphs.fake_graphs import FakeGraphs
from tests.worker.native.plan_driver import native_settings
from tests.worker.platform.host_device import FakeDriver, HostDevice
from tests.worker.triton_kernels.compile_kernels import NamedGpu
from xllm.protocol.sampling import SamplingParams
from xllm.worker.execution import reading
from xllm.worker.execution.device import runner, tensors
from xllm.worker.execution.device.under_way import StepsUnderWay
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.platform.cpu import CpuPlatform

MOST = 12
"""Sequences of a step: on four multiprocessors a few are cut into parts, so many are not."""
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, seed=0),
    "plain": SamplingParams(temperature=0.7, seed=5),
    "filtered": SamplingParams(temperature=0.7, seed=5, top_p=0.9, top_k=7),
}
CASES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"graph_max_batch": 0, "graph_max_rows": 0},
    "full alone": {"graph_max_rows": 0},
    "partial alone": {"graph_max_batch": 0},
    "one sequence": {"max_num_seqs": 1},
    "odd bounds": {"max_num_seqs": 7, "graph_max_batch": 3, "graph_max_rows": 21},
    "drafts": {"max_num_seqs": 5, "graph_max_batch": 4, "graph_max_rows": 24, "draft_tokens": 2},
    # A case that must fail: the parts of a step's numbers begin anywhere.
    "unaligned": {"alignment": 8},
}


class NamelessGpu(CpuPlatform):
    """A CPU whose kernels are Triton's, none of which runs."""

    kernels = "triton"

    def graphs(self) -> FakeGraphs:
        return FakeGraphs()

    def virtual_driver(self) -> FakeDriver:
        return FakeDriver(HostDevice())


class Keys:
    """The keys of what is launched from now on."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        driver.set_active(NamedGpu(90))
        assert driver.active.get_current_target() == GPUTarget("cuda", 90, 32)

        def note(kernel, *args, grid, warmup, **kwargs):
            assert all(size > 0 for size in grid)
            *_, binder = kernel.device_caches[driver.active.get_current_device()]
            _, specialization, options = binder(*args, **kwargs)
            self.found.add((kernel.__name__, f"{specialization} {options}"))

        JITFunction.run = note

    def take(self) -> set[tuple[str, str]]:
        found, self.found = self.found, set()
        return found


def steps_of(most: int, rng: random.Random) -> list[list[tuple[int, int, bool]]]:
    """Steps as (tokens before it, tokens of it, whether it draws) a sequence: decodes of every
    number, prompts of many lengths, in parts of which the last alone draws, and both."""
    starts = [0, 1, 15, 16, 17, 255, 256, 700]
    found = [[(rng.choice(starts[1:]), 1, True)] * count for count in range(1, most + 1)]
    lengths = (*range(2, 20), 31, 32, 33, 40)
    found += [[(rng.choice(starts), tokens, tokens % 2 == 0)] for tokens in lengths]
    for count in range(2, most + 1):
        decodes = [(rng.choice(starts[1:]), 1, True) for _ in range(rng.randrange(count))]
        prompts = [
            (rng.choice(starts), rng.randrange(1, 30), rng.random() < 0.7)
            for _ in range(count - len(decodes))
        ]
        found.append([*decodes, *prompts])
    return found


def verified_steps_of(
    most: int, draft_tokens: int, rng: random.Random
) -> list[tuple[list[tuple[int, int, bool]], int]]:
    """Steps whose first sequences, so many, verify drafts: all equally many, or beside decodes,
    others with drafts, and a prompt."""
    found = []
    for count in range(1, most + 1):
        each = range(2, draft_tokens + 2)
        found += [([(rng.randrange(1, 300), rows, True)] * count, count) for rows in each]
        mixed = [
            (rng.randrange(1, 300), rng.randrange(1, draft_tokens + 2), True) for _ in range(count)
        ]
        found.append(([*mixed, (17, 5, True)][:most], min(count, most)))
    return found


def launch(
    device: Any, step: list[tuple[int, int, bool]], kind: str, num_verified: int = 0
) -> None:
    """One step, drawn there, or (`host`) not."""
    sampling = SAMPLING["greedy" if kind == "host" else kind]
    lengths = {seq: start + count + (not draws) for seq, (start, count, draws) in enumerate(step)}
    table = table_of(lengths, sampling=sampling)
    parts = [(seq, start, count) for seq, (start, count, _) in enumerate(step)]
    batch = batch_of(table, parts, verified=range(num_verified))
    if kind == "host":
        device.hidden(batch)
        return
    device.under_way = StepsUnderWay()
    device.launch(0, batch, StepOutputs(len(step), ()))


def run(directory: pathlib.Path, fields: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """What warming up had compiled, and what was not when it was launched."""
    fields = dict(fields)
    most = fields.pop("max_num_seqs", MOST)
    draft_tokens = fields.pop("draft_tokens", 0)
    tensors._ALIGNMENT = fields.pop("alignment", 16)
    settings = native_settings(directory, **{"kernels": "torch", "block_size": 16, **fields})
    scheduler = dataclasses.replace(settings.scheduler, max_num_seqs=most)
    if draft_tokens:
        scheduler = dataclasses.replace(
            scheduler, drafting="prompt-lookup", draft_tokens=draft_tokens
        )
    executor = NativeExecutor(dataclasses.replace(settings, scheduler=scheduler))
    executor.load(lambda done, total: None)
    warm, missing, num_steps = keys.take(), set(), 0
    assert executor._engine is not None
    device = executor._engine.device
    assert device is not None
    rng = random.Random(1)
    with torch.inference_mode():
        for kind in (*SAMPLING, "host"):
            steps = [(step, 0) for step in steps_of(most, rng)]
            if draft_tokens:
                steps += verified_steps_of(most, draft_tokens, rng)
            for step, num_verified in steps:
                # As it is launched for the first time, and captured.
                for _ in range(2):
                    launch(device, step, kind, num_verified)
                    num_steps += 1
            missing |= keys.take() - warm
    used = {mode: count for mode, count in device.statistics().by_mode.items() if count}
    executor.close()
    return {
        "kernels": sorted({name for name, _ in warm}),
        "warm": len(warm),
        "missing": sorted(missing),
        "steps": num_steps,
        "modes": used,
    }


def main() -> None:
    """Run the cases that are named."""
    torch.set_num_threads(1)
    directory, *names = sys.argv[1:]
    keys = Keys()
    runner.CAPTURE_SHARE = 1.0
    reading.select_platform = lambda device, rank=0: NamelessGpu()
    for name in names:
        found = run(pathlib.Path(directory), CASES[name], keys)
        print("FOUND " + json.dumps({"case": name} | found), flush=True)


if __name__ == "__main__":
    main()
