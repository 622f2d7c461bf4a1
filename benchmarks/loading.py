"""How fast a native model loads, and how much memory it takes at its peak.

    python -m benchmarks.loading --model DIR [--threads 2] [--dtype bfloat16] [--kv-mib 512]
        [--kernels auto|torch] [--json OUT]

A process of its own reads the model's files (so that they are in the page cache) and measures how
fast they can be read from there; another copies them into fresh memory of the kind that weights
are kept in, with as many threads: the least that a loader that keeps them in memory does. A third
loads the executor and runs a prompt of 512 tokens and 16 decodes. Memory is what counts against a
limit: anonymous and shared, the peak of it, less that of the same process when it had only
imported torch. The bound is packed weights and KV, and 15%.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from benchmarks.context import context_length

PROMPT_TOKENS = 512
NUM_DECODES = 16
SLACK = 1.15
MIB = 1 << 20


def held_bytes() -> int:
    """Anonymous and shared memory of this process now."""
    found = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) * 1024
    return found


class PeakWatch:
    """The most memory that was held while it was open, looked at every 2 ms."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, held_bytes())


def read_s(directory: Path, num_threads: int) -> tuple[int, float]:
    """Bytes of the weights' files, and the seconds that it takes to read all of them from the page
    cache through a mapping: the second of two passes."""
    import torch

    from xllm.worker.kernels.compiled import load
    from xllm.worker.kernels.team import Team

    library = load().compiled
    team = None if library is None else Team(library, num_threads)
    total, seconds = 0, 0.0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            mapped = mmap.mmap(
                file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
            )
        numbers = torch.frombuffer(mapped, dtype=torch.uint8)[: len(mapped) // 64 * 64]
        total += len(mapped)
        for repetition in range(2):
            began = time.perf_counter()
            if team is None:
                numbers.view(torch.int64).sum()
            else:
                team.read_bandwidth(numbers)
            if repetition:
                seconds += time.perf_counter() - began
    return total, seconds


def copy_s(options: argparse.Namespace, out: Any) -> None:
    """Seconds that it takes to copy the weights' files into fresh memory. In a process of its
    own: memory that was used before is faster."""
    import torch

    from xllm.worker.kernels.compiled import load

    torch.set_num_threads(options.threads)
    library = load().compiled
    seconds = 0.0
    for path in sorted(Path(options.model).glob("*.safetensors")):
        size = path.stat().st_size // 8
        source = torch.from_file(str(path), shared=False, size=size, dtype=torch.int64)
        source.sum()
        target = torch.empty_like(source)
        if library is not None:
            target = library.allocate(size * 8).view(torch.int64)
        began = time.perf_counter()
        target.copy_(source)
        seconds += time.perf_counter() - began
    out.put(seconds)


def measure(options: argparse.Namespace, out: Any) -> None:
    """Load and run; puts the figures into a queue. Runs in a process of its own."""
    import torch

    from xllm.cli.bench.local_engine import LocalEngine
    from xllm.config.load import load
    from xllm.worker.execution.native import NativeExecutor

    torch.set_num_threads(options.threads)
    directory = Path(options.model)
    file_bytes, page_cache_s = read_s(directory, options.threads)
    settings = load(
        {
            "model.path": str(directory.resolve()),
            "model.dtype": options.dtype,
            "model.max_model_len": context_length(directory),
            "worker.num_threads": str(options.threads),
            "worker.kernels": options.kernels,
            "worker.kv_cache_bytes": str(options.kv_mib * MIB),
            "cluster.log_level": "warning",
        }
    )
    before = held_bytes()
    executor = NativeExecutor(settings)
    with PeakWatch() as watch, LocalEngine(settings, executor, lambda *sizes: None) as engine:
        loaded_bytes = held_bytes() - before
        engine.run([(tuple(range(3, 3 + PROMPT_TOKENS)), NUM_DECODES)])
        weight_bytes = executor.statistics().weight_bytes
        load_s = engine.ready.load_s
    allowed = SLACK * (weight_bytes + options.kv_mib * MIB)
    peak = watch.peak_bytes - before
    out.put(
        {
            "file_mib": file_bytes / MIB,
            "page_cache_s": page_cache_s,
            "load_s": load_s,
            "packed_mib": weight_bytes / MIB,
            "after_loading_mib": loaded_bytes / MIB,
            "peak_mib": peak / MIB,
            "allowed_mib": allowed / MIB,
            "of_allowed": peak / allowed,
        }
    )


def in_child(work: Callable[[argparse.Namespace, Any], None], options: argparse.Namespace) -> Any:
    """What `work` puts into its queue."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=work, args=(options, out))
    child.start()
    found = out.get(timeout=600)
    child.join()
    return found


def main() -> None:
    """Measure in a child, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-mib", type=int, default=512)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    copied = in_child(copy_s, options)
    found = in_child(measure, options)
    found |= {"copy_s": copied, "of_copy": found["load_s"] / copied}
    for name, value in found.items():
        print(f"{name:>18} {value:10.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
