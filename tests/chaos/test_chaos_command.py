"""`xllm chaos` as a command: what it refuses, and what it leaves behind when it is ended."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from xllm.cli.chaos.processes import descendants
from xllm.cli.chaos.soak import soak
from xllm.cli.main import run_command

START_S = 60.0


@pytest.mark.parametrize(
    ("flag", "value", "bound"),
    [
        ("--seconds", "-4", "0<=x<=604800"),
        ("--seconds", "nan", "0<=x<=604800"),
        ("--slack", "inf", "1<=x<=100"),
        ("--step-ms", "nan", "0<=x<=1000"),
    ],
)
def test_a_number_that_is_out_of_its_bounds_starts_nothing(flag, value, bound, capsys):
    assert run_command(["chaos", flag, value]) == 64
    said = capsys.readouterr().err
    assert flag in said
    assert bound in said


@pytest.mark.parametrize(
    ("flag", "value", "bound"),
    [
        ("--minutes", "0", "0<x<=10080"),
        ("--repeat", "-1", "0<=x<=100000"),
        ("--tokens", "1", "20<=x<=4000"),
        ("--seed", "-1", "x>=0"),
    ],
)
def test_a_soak_has_bounds_too(flag, value, bound, capsys):
    assert run_command([flag, value], soak, "soak") == 64
    assert bound in capsys.readouterr().err


@pytest.mark.process
def test_a_run_that_is_ended_takes_its_cluster_and_its_directory_with_it():
    command = [sys.executable, "-m", "xllm", "chaos", "--scenario", "F01"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        directory = wait_directory(run.pid)
        family = descendants(run.pid)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=START_S)[1]
    assert run.returncode == 143, said
    assert family
    assert not directory.exists()
    assert not [pid for pid in family if pathlib.Path(f"/proc/{pid}/exe").exists()]


def wait_directory(pid):
    """The directory of the cluster that this process started, once it has processes."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for child in descendants(pid):
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if "--cluster-run-dir" in words:
                    return pathlib.Path(words[words.index("--cluster-run-dir") + 1]).parent
        time.sleep(0.05)
    raise AssertionError("no cluster was started")
