"""Logs tell where something failed, and nothing of what it failed on."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, structlog
from xllm.protocol.actor.logs import configure_logs

def fail(prompt):
    raise ValueError("it failed")

configure_logs(process="p", log_format=sys.argv[1])
try:
    fail("SECRET" + "-PROMPT")
except ValueError:
    structlog.get_logger("x").exception("broken", request_id="r1")
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_shows_no_values(log_format):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    for word in ("broken", "r1", "in fail", "it failed"):
        assert word in done.stderr
    assert "SECRET-PROMPT" not in done.stderr
