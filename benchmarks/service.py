"""The service's own speed: all processes with the toy engine, and the generator, on one machine.

    python -m benchmarks.service [--reps 5] [--seconds 4] [--cases zmq-1,http-1] [--out FILE]
        [--mock "COMMAND with {port}"] [--mock-load "COMMAND with {url} and {seconds}"]

Each repetition runs the mock back-end (a bare HTTP answerer, the yardstick of this machine in
these minutes) and every case in turn, so that a slow minute hits all alike. Prints medians, the
CPU microseconds a request by process, and each figure against its target scaled by the yardstick
(targets are stated for a machine on which the mock answers 100,000 requests a second).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any

from benchmarks.cpu import ROLES, cpu_seconds, process_tree

YARDSTICK = 100_000.0
ZMQ = "{python} -m benchmarks.load_zmq --endpoint {zmq} --seconds {seconds} "
HTTP = "{python} -m benchmarks.load_http --url {http}/v1/chat/completions --seconds {seconds} "

# Each case: its command, the figure to take, the target, the unit.
CASES: dict[str, tuple[str, str, float, str]] = {
    "zmq-1": (ZMQ + "--concurrency 64 --tokens 1 --batch", "requests_s", 4000, "requests/s"),
    "zmq-stream-hold": (
        ZMQ + "--concurrency 256 --tokens 256 --hold-ms 20 --prompt-chars 64",
        "tokens_s",
        100_000,
        "tokens/s",
    ),
    "zmq-stream-each": (
        ZMQ + "--concurrency 256 --tokens 256 --hold-ms 0 --prompt-chars 64",
        "deltas_s",
        25_000,
        "messages/s",
    ),
    "http-1": (HTTP + "--concurrency 64 --tokens 1", "requests_s", 2500, "requests/s"),
    "http-stream": (
        HTTP + "--concurrency 64 --tokens 64 --stream --prompt-chars 64",
        "tokens_s",
        40_000,
        "tokens/s",
    ),
    "zmq-latency": (
        ZMQ + "--concurrency 1 --tokens 1 --batch --prompt-chars 64",
        "p50_ms",
        1.0,
        "ms p50 at concurrency 1",
    ),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_http(url: str, process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    """Until the address answers 200, or SystemExit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{url}: its process exited with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{url} was not ready in {limit_s:.0f} s")


def run_load(command: str) -> dict[str, Any]:
    """One generator run; its last line is JSON."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def kind_of(pid: int) -> str:
    """The role of a process of the service, by the name that it bears."""
    try:
        name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
    if not name.startswith("xllm:"):
        return "launcher"
    return next((role for role in ROLES if role in name), "master")


class Bench:
    """A running service and mock, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.figures: dict[str, list[float]] = {}
        self.cpu: dict[str, list[dict[str, float]]] = {}
        self.errors: dict[str, dict[str, int]] = {}
        http_port, zmq_port, mock_port = free_port(), free_port(), free_port()
        self.names = {
            "python": sys.executable,
            "zmq": f"tcp://127.0.0.1:{zmq_port}",
            "http": f"http://127.0.0.1:{http_port}",
            "seconds": options.seconds,
        }
        mock = options.mock.format(python=sys.executable, port=mock_port)
        self.mock_url = f"http://127.0.0.1:{mock_port}/v1/chat/completions"
        self.mock = subprocess.Popen(shlex.split(mock), stdout=subprocess.DEVNULL)
        serve = (
            f"{sys.executable} -m xllm serve --worker-engine toy --port {http_port} "
            f"--zmq-port {zmq_port} {options.serve}"
        )
        self.log = open(options.log, "wb")  # noqa: SIM115  # for the life of the service
        start = time.monotonic()
        self.service = subprocess.Popen(shlex.split(serve), stdout=self.log, stderr=self.log)
        wait_http(self.names["http"] + "/health/ready", self.service)
        print(f"service ready in {time.monotonic() - start:.1f} s", flush=True)

    def yardstick(self) -> None:
        command = self.options.mock_load.format(
            python=sys.executable, url=self.mock_url, seconds=self.options.seconds
        )
        result = run_load(command)
        rate = float(result.get("requests_s") or result["req_s"])
        self.figures.setdefault("mock", []).append(rate)
        print(f"mock {rate:,.0f} requests/s", flush=True)

    def case(self, name: str) -> None:
        template, figure, _, unit = CASES[name]
        pids = process_tree(self.service.pid)
        before = {pid: cpu_seconds(pid) for pid in pids}
        result = run_load(template.format(**self.names))
        spent: dict[str, float] = {}
        for pid, was in before.items():
            kind = kind_of(pid)
            spent[kind] = spent.get(kind, 0.0) + cpu_seconds(pid) - was
        # The warm-up second is in the CPU times but not in the counts.
        requests = max(1, result["requests"]) * (self.options.seconds + 1) / self.options.seconds
        self.cpu.setdefault(name, []).append({k: 1e6 * v / requests for k, v in spent.items()})
        self.figures.setdefault(name, []).append(result[figure])
        for what, count in result["errors"].items():
            errors = self.errors.setdefault(name, {})
            errors[what] = errors.get(what, 0) + count
        print(f"{name} {result[figure]:,} {unit} {result}", flush=True)

    def close(self) -> None:
        self.mock.kill()
        self.mock.wait()
        self.service.send_signal(signal.SIGINT)
        self.service.wait(30)
        self.log.close()

    def table(self) -> str:
        scale = statistics.median(self.figures["mock"]) / YARDSTICK
        lines = [
            f"mock back-end: median {statistics.median(self.figures['mock']):,.0f} requests/s, "
            f"targets scaled by {scale:.2f}",
            "",
            "| case | median | min | max | target here | met | "
            + " | ".join(f"{role} us" for role in ROLES)
            + " | errors |",
            "|---" * (7 + len(ROLES)) + "|",
        ]
        for name, values in self.figures.items():
            if name == "mock":
                continue
            _, figure, target, unit = CASES[name]
            median = statistics.median(values)
            slower = figure.endswith("_ms")
            here = target / scale if slower else target * scale
            met = median <= here if slower else median >= here
            cost = [statistics.median(c.get(role, 0.0) for c in self.cpu[name]) for role in ROLES]
            lines.append(
                f"| {name} ({unit}) | {median:,.6g} | {min(values):,.6g} | {max(values):,.6g} | "
                f"{here:,.6g} | {'yes' if met else 'NO'} | "
                + " | ".join(f"{c:.0f}" for c in cost)
                + f" | {self.errors.get(name) or 0} |"
            )
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--serve", default="--no-worker-toy-memory", help="more flags for serve")
    parser.add_argument("--mock", default="{python} -m benchmarks.mock_backend --port {port}")
    parser.add_argument(
        "--mock-load",
        default="{python} -m benchmarks.load_http --url {url} --concurrency 64 --seconds {seconds}",
    )
    parser.add_argument("--log", default="/tmp/xllm-bench.log")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    bench = Bench(options)
    try:
        for _ in range(options.reps):
            bench.yardstick()
            for name in options.cases.split(","):
                bench.case(name)
    finally:
        bench.close()
    print(bench.table())
    if options.out:
        record = {"figures": bench.figures, "cpu_us": bench.cpu, "errors": bench.errors}
        pathlib.Path(options.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
