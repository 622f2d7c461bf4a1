"""Runs a command whose monotonic clock is not everybody's: in a time namespace of its own, as
after a move to a machine that was started at another time. Linux lets root do that.

As a module: `python -m xllm.cli.chaos.other_clock SECONDS COMMAND...` becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

AHEAD_S = 86_400
"""The monotonic clock of such a process says so much more."""
_CLONE_NEWTIME = 0x80
_ALLOWED_S = 20.0


def wrapper(seconds: int = AHEAD_S) -> tuple[str, ...]:
    """What stands before a command that is to run so."""
    return (sys.executable, "-m", "xllm.cli.chaos.other_clock", str(seconds))


def why_not() -> str:
    """What this machine or user lacks for it; empty: nothing."""
    command = [*wrapper(), "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ALLOWED_S, check=False)
    return f"no time namespace: {done.stderr.strip()[-200:]}" if done.returncode else ""


def offset_of(pid: int) -> int:
    """Seconds that the monotonic clock of a process is ahead of the machine's."""
    text = Path(f"/proc/{pid}/timens_offsets").read_text()
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    return int(rows["monotonic"].split()[0])


def enter(seconds: int) -> None:
    """Move this process, of one thread, into a namespace of its own. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWTIME):
        raise _last_error("unshare")
    offsets = f"monotonic {seconds} 0\nboottime {seconds} 0\n"
    Path("/proc/self/timens_offsets").write_text(offsets)
    with open("/proc/self/ns/time_for_children", "rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWTIME):
            raise _last_error("setns")


def _last_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)


if __name__ == "__main__":
    try:
        enter(int(sys.argv[1]))
    except OSError as error:
        sys.exit(str(error))
    os.execvp(sys.argv[2], sys.argv[2:])
