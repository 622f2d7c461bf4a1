"""`xllm chat --start`: what scripts/quickstart runs, with the bundled demo model."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served, wait_until
from xllm import Client

pytestmark = pytest.mark.process


def chat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xllm", "chat", "--start", "--message", "What is xLLM?", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_demo_model_answers():
    done = chat("--temperature", "0", "--max-tokens", "64")
    assert done.returncode == 0, done.stderr
    assert "xLLM is" in done.stdout
    assert "ready in" in done.stderr
    assert "TTFT" in done.stderr
    assert "tokens/s" in done.stderr


def test_a_start_that_fails():
    done = chat("--start-model", "/nowhere")
    assert done.returncode == 69
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_stops_the_answer_only(tmp_path, run_dir):
    model = make_toy_model(tmp_path / "m")
    with Served(model, run_dir, "--worker-toy-step-ms", "50") as served:
        process = subprocess.Popen(
            [sys.executable, "-m", "xllm", "chat", "--endpoint", served.zmq, "--ignore-eos"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdin is not None
            process.stdin.write("hello\n")
            process.stdin.flush()
            with Client(served.zmq, timeout_s=20) as client:
                wait_until(lambda: _num_running(client) == 1, what="the answer's start")
                process.send_signal(signal.SIGINT)
                wait_until(lambda: _num_running(client) == 0, what="the answer's end")
            _, err = process.communicate("/exit\n", timeout=20)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 0, err
        assert "[stopped]" in err


def _num_running(client: Client) -> int:
    return sum(process.num_running for process in client.status() if process.kind == "instance")
