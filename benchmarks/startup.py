"""Seconds from the start of `xllm serve` to ready, and to a clean end; and what imports take.

    python -m benchmarks.startup [--reps 5] [-- flags of xllm serve]

Ready is the first 200 of /health/ready, which proves the data path through router, master and
worker; the end is measured from SIGINT to the launcher's exit. `xllm --help` and a toy worker's
executor are started in interpreters of their own.
"""

from __future__ import annotations

import argparse
import resource
import signal
import statistics
import subprocess
import sys
import time

from benchmarks.service import free_port, wait_http

HELP = "from xllm.cli.main import run_command; run_command(['--help'])"
WORKER = """
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.worker import process
from xllm.worker.factory import make_executor
make_executor(Settings(worker=WorkerSettings(engine="toy"))).load(lambda done, total: None)
"""


def measure_code(code: str) -> tuple[float, float]:
    """A fresh interpreter that runs `code`: seconds until its end, and of processor time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    passed, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(flags: list[str]) -> tuple[float, float]:
    """One start and end."""
    port = free_port()
    command = [sys.executable, "-m", "xllm", "serve", "--port", str(port), "--zmq-port", "0"]
    start = time.monotonic()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    wait_http(f"http://127.0.0.1:{port}/health/ready", process)
    ready = time.monotonic()
    process.send_signal(signal.SIGINT)
    if process.wait(30):
        raise SystemExit(f"serve exited with {process.returncode}")
    return ready - start, time.monotonic() - ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags of xllm serve, after --")
    options = parser.parse_args()
    runs = [measure(options.flags) for _ in range(options.reps)]
    show(("ready", "end"), runs)
    for name, code in (("--help", HELP), ("toy worker", WORKER)):
        show((name, f"{name}, CPU"), [measure_code(code) for _ in range(options.reps)])


def show(names: tuple[str, ...], runs: list[tuple[float, ...]]) -> None:
    """A line for each of the figures of all runs."""
    for name, values in zip(names, zip(*runs, strict=True), strict=True):
        ordered = sorted(values)
        print(
            f"{name}: median {statistics.median(ordered):.2f} s, "
            f"min {ordered[0]:.2f} s, max {ordered[-1]:.2f} s, {len(ordered)} runs"
        )


if __name__ == "__main__":
    main()
