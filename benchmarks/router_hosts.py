"""What the router's benchmark measures: our routers before instant instances, a peer before
instant back-ends. Both are processes on loopback, started here and ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import IO

from benchmarks.cpu import exact_cpu_seconds, process_tree
from benchmarks.service import free_port, wait_http
from xllm.cli.model_source import resolve_model
from xllm.config.served_model import ModelSettings
from xllm.router.text.model import load_text_model

START_S = 60.0
NUM_LOOKS = 20
"""Successes in a row after which all routers of a port are taken to be ready."""


class Host:
    """Processes that end with the block; `router_pids` are those whose CPU counts."""

    http = ""
    """Address of the HTTP server."""

    def __init__(self, log: IO[bytes]) -> None:
        self.log = log
        self.processes: list[subprocess.Popen[bytes]] = []
        self.routers: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.processes.append(process)
        return process

    def router_pids(self) -> list[int]:
        return [pid for router in self.routers for pid in process_tree(router.pid)]

    def router_cpu_s(self, threads: str = "") -> float:
        """CPU seconds of all routers, or of their threads whose name begins so."""
        return sum(exact_cpu_seconds(pid, threads) for pid in self.router_pids())

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class OurHost(Host):
    """`count` routers on one HTTP port, before `instances` instant instances."""

    def __init__(
        self, log: IO[bytes], count: int, instances: int, model: str, flags: str = ""
    ) -> None:
        super().__init__(log)
        path, self.model = resolve_model(ModelSettings(path=model))
        self.text = load_text_model(path, kept_bytes=0)
        self._directory = tempfile.TemporaryDirectory(prefix="xr")
        run_dir = self._directory.name
        self.instance = f"ipc://{run_dir}/i-0"
        common = ["--run-dir", run_dir, "--model", self.model]
        common += ["--vocab-size", str(self.text.num_tokens)]
        for index in range(instances):
            command = [sys.executable, "-m", "benchmarks.instant_instance", *common]
            command += ["--name", f"i-{index}"] + ([] if index else ["--registry-here"])
            self.start(command)
        port = free_port()
        self.http = f"http://127.0.0.1:{port}"
        self.zmq = []
        for index in range(count):
            zmq_port = free_port()
            self.zmq.append(f"tcp://127.0.0.1:{zmq_port}")
            command = [sys.executable, "-m", "xllm", "router", "--model", path]
            command += ["--registry", f"ipc://{run_dir}/registry", "--port", str(port)]
            command += ["--zmq-port", str(zmq_port), "--router-name", f"router-{index}"]
            command += ["--cluster-run-dir", run_dir, "--served-model-name", self.model]
            command += ["--log-level", "warning", "--router-policy", "round-robin"]
            command += ["--router-max-body-bytes", str(32 << 20), *shlex.split(flags)]
            self.routers.append(self.start(command + ["--router-share-port"] * (count > 1)))
        for router in self.routers:
            # Each connection goes to one of them: so many meet all.
            for _ in range(NUM_LOOKS):
                wait_http(f"{self.http}/health/ready", router, START_S)

    def close(self) -> None:
        super().close()
        self._directory.cleanup()


class PeerHost(Host):
    """`sglang-router` before instant HTTP back-ends. `python`: an interpreter that has it;
    `backend`: the program of one back-end, which takes `--port`."""

    def __init__(self, log: IO[bytes], python: str, backend: str, count: int) -> None:
        super().__init__(log)
        workers = []
        for _ in range(count):
            port = free_port()
            workers.append(f"http://127.0.0.1:{port}")
            one = self.start([sys.executable, *shlex.split(backend), "--port", str(port)])
            wait_http(f"{workers[-1]}/health", one, START_S)
        self.direct = workers[0]
        port = free_port()
        self.http = f"http://127.0.0.1:{port}"
        command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--policy", "round_robin", "--log-level", "warn"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--max-payload-size", str(32 << 20)]
        router = self.start([*command, "--worker-urls", *workers])
        self.routers.append(router)
        wait_http(f"{self.http}/health", router, START_S)
        self._wait_workers()

    def _wait_workers(self) -> None:
        """Until it has found its back-ends and routes to them."""
        body = b'{"model":"mock","messages":[{"role":"user","content":"hi"}],"max_tokens":1}'
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            request = urllib.request.Request(
                f"{self.http}/v1/chat/completions", body, {"content-type": "application/json"}
            )
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise SystemExit("the peer does not route to its back-ends")


def make_log(path: str) -> IO[bytes]:
    """Where the processes' own words go."""
    return pathlib.Path(path).open("wb")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured."""
    parser.add_argument("--routers", type=int, default=2, help="of ours; the peer has one")
    parser.add_argument("--instances", type=int, default=2, help="behind either")
    parser.add_argument("--model", default="", help="whose tokenizer is used; empty: the demo's")
    parser.add_argument("--serve", default="", help="more flags for our routers")
    parser.add_argument("--peer-python", default="", help="an interpreter that has sglang-router")
    parser.add_argument("--peer-backend", default="-m benchmarks.mock_backend")
