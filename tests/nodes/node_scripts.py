"""Runs the node scripts as an operator would, for tests."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time

from tests.architecture.sources import ROOT
from xllm.cli.node_file import read_node_file
from xllm.cli.node_process import files_of, running_pid

TIMEOUT_S = 60


def run_script(name, *arguments):
    """Run `scripts/<name>`; the command `xllm` is the one beside this interpreter."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(ROOT / "scripts" / name), *map(str, arguments)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@contextlib.contextmanager
def stopped_at_the_end(*files):
    """Whatever happens, the nodes of these files are stopped."""
    try:
        yield
    finally:
        for file in files:
            run_script("node-stop", file)


def pids(file):
    """Pid by process name of what runs of a node file."""
    node = read_node_file(str(file))
    return {process.name: running_pid(files_of(node, process)) for process in node.processes}


def logs(file):
    """All logs of a node, for the message of a failed test."""
    folder = pathlib.Path(read_node_file(str(file)).log_dir)
    return "\n".join(f"{p.name}:\n{p.read_text()[-2000:]}" for p in sorted(folder.glob("*.log")))


def wait_until(condition, timeout_s=10.0):
    """Wait for a condition; AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
