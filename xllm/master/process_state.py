"""What the kernel says of a process of this machine, and what the end of one says."""

from __future__ import annotations

import signal

_VMSTAT = "/proc/vmstat"
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no process of ours gives itself."""
_AT_A_SIGNAL = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of one that was asked to end, once or twice."""


def ended_by_itself(code: int, *, may_be_oom: bool) -> bool:
    """Whether what a process did may be why it ended: with an exit code, or (negative) by a signal.
    `may_be_oom`: whether the kernel killed anybody for want of memory meanwhile: it sends SIGKILL,
    too, and the process may have asked for that memory."""
    if code == -signal.SIGKILL:
        return may_be_oom
    return -code not in _FROM_OUTSIDE and code not in _AT_A_SIGNAL


def count_oom_kills() -> int:
    """How many processes of this machine the kernel has killed for want of memory; -1 where it
    does not say."""
    try:
        with open(_VMSTAT, "rb") as file:
            for line in file:
                name, _, count = line.partition(b" ")
                if name == b"oom_kill":
                    return int(count)
    except (OSError, ValueError):
        pass  # a kernel that keeps no such account
    return -1


def is_process_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (state T of proc(5)); False if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The name in parentheses may hold anything; the state follows the last of them.
    return line[line.rfind(b")") + 2 :].startswith(b"T")
