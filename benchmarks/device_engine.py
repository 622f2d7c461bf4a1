"""The engine on an accelerator: steps of models of true shapes, against what the device can do.

    python -m benchmarks.device_engine [--shapes 0.6b,1.7b,4b,8b] [--device cuda]
        [--batches 1,64,256] [--context 2048] [--steps 64] [--json]

Models of random weights in bfloat16 (`benchmarks.random_model`), one after the other, an executor
in this process, plans by a driver that costs next to nothing. Per model: decodes of each batch at
the context, median time of a step; a prompt of as many tokens; both beside the device's copy
bandwidth and matrix rate, measured before the first and behind the last model of the same run.
Then the decodes of each batch without graphs, and waiting for each step before the next one is
launched, in turns with the way it is meant to be. Last the peak of the device's memory beside the
plan that the engine printed.

The bound of a decode step: the weights are read once and so are the keys and values of every
sequence, at the copy bandwidth, or the products take as long as at the matrix rate, whatever is
longer for the products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import random
import statistics
import tempfile
from typing import Any

import torch

from benchmarks.device_costs import Limits
from benchmarks.device_kernels import Stage, gpu_clock, measure_limits
from benchmarks.random_model import SHAPES, tensor_shapes, write_random_model
from benchmarks.step_driver import Driven, StepDriver
from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.platform.cuda_driver import CudaDriver

_ITEM_BYTES = 2
_TURNS = 3
_LIMIT_REPS = 20


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What a step must at least do: bytes of weights and of keys and values that it reads, and
    floating-point operations of its products and its attention."""

    weight_bytes: int
    kv_bytes: int
    product_flops: int
    attention_flops: int

    def bound_s(self, limits: Limits) -> float:
        """The least time: products bound by weights or by arithmetic, then the attention."""
        products = max(self.weight_bytes / limits.bandwidth, self.product_flops / limits.rate)
        attention = max(self.kv_bytes / limits.bandwidth, self.attention_flops / limits.rate)
        return products + attention


def decode_work(sizes: dict[str, int], batch: int, context: int) -> StepWork:
    """Of one token for each of `batch` sequences with `context` tokens."""
    return _work(sizes, num_rows=batch, num_read=batch, seen=batch * context)


def prefill_work(sizes: dict[str, int], num_tokens: int) -> StepWork:
    """Of one prompt, whose last token alone is drawn from."""
    seen = num_tokens * (num_tokens + 1) // 2
    work = _work(sizes, num_rows=num_tokens, num_read=1, seen=seen)
    return dataclasses.replace(work, kv_bytes=_token_bytes(sizes) * num_tokens)


def _token_bytes(sizes: dict[str, int]) -> int:
    heads = sizes["num_key_value_heads"] * sizes["head_dim"]
    return 2 * heads * _ITEM_BYTES * sizes["num_hidden_layers"]


def _work(sizes: dict[str, int], *, num_rows: int, num_read: int, seen: int) -> StepWork:
    shapes = tensor_shapes(sizes)
    head = sizes["vocab_size"] * sizes["hidden_size"]
    layers = sum(
        shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )
    queries = sizes["num_attention_heads"] * sizes["head_dim"] * sizes["num_hidden_layers"]
    return StepWork(
        _ITEM_BYTES * (layers + head),
        _token_bytes(sizes) * seen,
        2 * (num_rows * layers + num_read * head),
        4 * queries * seen,
    )


def settings_for(directory: pathlib.Path, options: argparse.Namespace, **worker: Any) -> Settings:
    """An engine for the largest batch of the run."""
    most = max(options.batches)
    return Settings(
        model=ModelSettings(
            path=str(directory), max_model_len=options.context + 2 * options.steps + 16
        ),
        scheduler=SchedulerSettings(max_num_seqs=most),
        worker=WorkerSettings(device=options.device, **worker),
    )


class Bench:
    """One model, its executor, and the times of its steps."""

    def __init__(self, sizes: dict[str, int], settings: Settings, context: int) -> None:
        self._context = context
        self._vocab_size = sizes["vocab_size"]
        self.executor = NativeExecutor(settings)
        self._driver = StepDriver(self.executor)

    def decode(self, batch: int, num_steps: int, ahead: int = 2) -> float:
        """Median seconds of a step of `batch` sequences."""
        sequences = self._sequences(batch, num_steps)
        self._driver.prefill(sequences, chunk=8192)
        self._driver.ahead = ahead
        times = self._driver.decode(sequences, num_steps)
        self._driver.end(sequences)
        return statistics.median(times)

    def prefill(self, repetitions: int = 7) -> float:
        """Median seconds of a prompt of the context's length, in one step."""
        times = []
        for _ in range(repetitions):
            sequences = self._sequences(1, 1)
            times.append(self._driver.prefill(sequences, chunk=self._context))
            self._driver.end(sequences)
        return statistics.median(times)

    def totals(self) -> dict[str, Any]:
        """How the steps were launched, and the peak of memory beside the plan."""
        found = self.executor.statistics()
        # Blocks of KV come from the driver, all else from torch.
        peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return {
            "device": None if found.device is None else dataclasses.asdict(found.device),
            "peak_bytes": peak + found.pool.total_bytes,
            "planned_bytes": None if found.plan is None else found.plan.total_bytes,
        }

    def close(self) -> None:
        """Give the device's memory back."""
        self.executor.close()

    def _sequences(self, batch: int, room: int) -> list[Driven]:
        rng = random.Random(batch)
        prompts = [
            [rng.randrange(self._vocab_size) for _ in range(self._context)] for _ in range(batch)
        ]
        return self._driver.sequences(prompts, room + 2)


def measure_shape(
    sizes: dict[str, int], directory: pathlib.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Times of one model: as it is meant to be, without graphs, and waiting for each step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    plain = Bench(sizes, settings_for(directory, options), options.context)
    eager_settings = settings_for(directory, options, graph_max_batch=0, graph_max_rows=0)
    found: dict[str, Any] = {"prefill_s": plain.prefill(), "decode_s": {}}
    for batch in options.batches:
        found["decode_s"][str(batch)] = plain.decode(batch, options.steps)
    found["waiting_s"] = {
        str(batch): _in_turns(plain, batch, options.steps) for batch in options.batches
    }
    found |= plain.totals()
    plain.close()
    eager = Bench(sizes, eager_settings, options.context)
    found["eager_s"] = {str(batch): eager.decode(batch, options.steps) for batch in options.batches}
    eager.close()
    return found


def _in_turns(bench: Bench, batch: int, num_steps: int) -> dict[str, float]:
    """Median seconds of a step with one plan ahead and with none, in turns."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(_TURNS):
        for ahead in (1, 2) if number % 2 else (2, 1):
            times[ahead].append(bench.decode(batch, num_steps, ahead))
    return {name: statistics.median(times[ahead]) for name, ahead in (("off", 1), ("on", 2))}


def ratios(
    sizes: dict[str, int], found: dict[str, Any], limits: Limits, context: int
) -> dict[str, Any]:
    """How near the bounds the times are, and what graphs and the pipeline gain."""
    prefill = prefill_work(sizes, context)
    flops = prefill.product_flops + prefill.attention_flops
    result: dict[str, Any] = {
        "prefill_of_matrix_rate": flops / found["prefill_s"] / limits.rate,
        "decode_of_bound": {},
        "graphs": {},
        "pipeline": {},
    }
    for batch, seconds in found["decode_s"].items():
        bound = decode_work(sizes, int(batch), context).bound_s(limits)
        result["decode_of_bound"][batch] = bound / seconds
        result["graphs"][batch] = found["eager_s"][batch] / seconds
        result["pipeline"][batch] = (
            found["waiting_s"][batch]["off"] / found["waiting_s"][batch]["on"]
        )
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="0.6b,1.7b,4b,8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda", choices=("cuda",))
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    options.shapes = options.shapes.split(",")
    for shape in options.shapes:
        if shape not in SHAPES:
            parser.error(f"--shapes: {shape} is none of {', '.join(SHAPES)}")
    return options


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a CUDA build of torch")
    device = torch.device(options.device)
    stage = Stage(device, CudaDriver(device), gpu_clock)
    before = measure_limits(stage, _LIMIT_REPS)
    report: dict[str, Any] = {"limits": dataclasses.asdict(before), "models": {}}
    with tempfile.TemporaryDirectory(prefix="xllm-device-") as directory:
        for shape in options.shapes:
            path = write_random_model(SHAPES[shape], pathlib.Path(directory) / shape)
            found = measure_shape(SHAPES[shape], path, options)
            found["ratios"] = ratios(SHAPES[shape], found, before, options.context)
            report["models"][shape] = found
            if not options.json:
                print(shape, json.dumps(found["ratios"]), flush=True)
    report["limits_after"] = dataclasses.asdict(measure_limits(stage, _LIMIT_REPS))
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
