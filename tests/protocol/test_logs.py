"""Logs tell where something failed, and nothing of what it failed on."""

import io
import subprocess
import sys

import pytest

from xllm.protocol.actor.logs import LogStream

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


FULL = """
import sys, structlog
from xllm.protocol.actor.logs import configure_logs

configure_logs(process="p", log_dir=sys.argv[1])
for _ in range(1000):
    structlog.get_logger("x").warning("word " * 20)
print("went on")
"""


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_a_log_that_cannot_be_written_changes_nothing(redirect):
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" "" {redirect}', sys.executable, FULL],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "went on\n"


def test_a_log_file_on_a_full_disk_changes_nothing(tmp_path):
    (tmp_path / "p.log").symlink_to("/dev/full")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "went on\n"


class FullDisk:
    """Takes nothing."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")

    def isatty(self):
        raise OSError(28, "No space left on device")


def test_what_is_lost_is_counted():
    closed = io.StringIO()
    closed.close()
    for stream in (LogStream(FullDisk()), LogStream(closed)):
        stream.write("a")
        stream.flush()
        assert stream.num_lost >= 1
        assert not stream.isatty()
    nobody = LogStream(None)
    nobody.write("a")
    assert nobody.num_lost == 1
