"""What the kernel says of a process of this machine."""

from __future__ import annotations


def is_process_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (state T of proc(5)); False if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The name in parentheses may hold anything; the state follows the last of them.
    return line[line.rfind(b")") + 2 :].startswith(b"T")
