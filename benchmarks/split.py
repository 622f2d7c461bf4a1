"""Where a request's CPU goes inside the processes: sampled stacks, sorted into kinds of work.

    python -m benchmarks.split [--case http-1] [--seconds 6]

Runs one case of benchmarks.service while py-spy samples router, master and worker, and prints
CPU microseconds a request by process and kind of work: a sample belongs to the innermost frame
that a pattern knows. Needs py-spy and the right to trace the processes.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading

from benchmarks.cpu import process_tree
from benchmarks.service import CASES, Bench, kind_of

KINDS = [
    ("hash", r"kvcache/hashing"),
    ("tokenize", r"text/(segments|words?_?|model|template|pool)|jinja2"),
    ("detokenize", r"text/(detokenizer|output|pieces|stops)"),
    ("send and receive", r"protocol/(transport|codec)"),
    ("HTTP", r"router/http|uvicorn|starlette|httptools"),
    ("decide", r"router/|master/|kvcache/"),
    ("toy engine", r"worker/toy"),
    ("engine loop", r"worker/"),
    # What no frame of ours is under: uvloop reads and writes TCP connections there.
    ("loop", r"actor/run|asyncio/runners"),
]
PATTERNS = [(name, re.compile(pattern)) for name, pattern in KINDS]


def classify(stack: str) -> str:
    """The kind of work of one sampled stack, outermost frame first."""
    for frame in reversed(stack.split(";")):
        for name, pattern in PATTERNS:
            if pattern.search(frame):
                return name
    return "other"


def py_spy() -> str:
    """The program, on the path or beside this interpreter."""
    beside = pathlib.Path(sys.executable).with_name("py-spy")
    return shutil.which("py-spy") or str(beside)


def sample(pid: int, seconds: float, found: dict[str, int]) -> None:
    """Samples by kind of work of one process. OSError or SubprocessError: there are none."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "raw"
        command = [py_spy(), "record", "-p", str(pid), "-d", str(int(seconds)), "-r", "250"]
        command += ["-f", "raw", "-F", "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=seconds + 60)
        for line in path.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            kind = classify(stack)
            found[kind] = found.get(kind, 0) + int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), default="http-1")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--serve", default="--no-worker-toy-memory")
    parser.add_argument("--mock", default="{python} -m benchmarks.mock_backend --port {port}")
    parser.add_argument("--log", default="/tmp/xllm-split.log")
    options = parser.parse_args()
    bench = Bench(options)
    try:
        pids = {kind_of(pid): pid for pid in process_tree(bench.service.pid)}
        kinds: dict[str, dict[str, int]] = {"router": {}, "master": {}, "worker": {}}
        threads = [
            threading.Thread(target=sample, args=(pids[role], options.seconds, found))
            for role, found in kinds.items()
        ]
        for thread in threads:
            thread.start()
        bench.case(options.case)
        for thread in threads:
            thread.join()
    finally:
        bench.close()
    print("| process | work | us a request | share |\n|---|---|---|---|")
    for role, found in kinds.items():
        cost = bench.cpu[options.case][0].get(role, 0.0)
        total = sum(found.values()) or 1
        for kind, count in sorted(found.items(), key=lambda item: -item[1]):
            print(f"| {role} | {kind} | {cost * count / total:.0f} | {100 * count / total:.0f}% |")


if __name__ == "__main__":
    main()
