"""`xllm chat --start`: what scripts/quickstart runs, with the bundled demo model."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
