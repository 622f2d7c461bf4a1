"""CPU seconds of the processes of a service, by what they are."""

from __future__ import annotations

import os
import pathlib

_TICKS = os.sysconf("SC_CLK_TCK")
ROLES = ("router", "master", "worker", "kvcache")


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                todo += map(int, task.read_text().split())
            except OSError:
                continue  # the thread ended meanwhile
    return found


def exact_cpu_seconds(pid: int, name: str = "") -> float:
    """The same to the nanosecond, of threads that are alive and whose name begins so."""
    total = 0
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*"):
        try:
            if not name or (task / "comm").read_text().startswith(name):
                total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue  # the thread ended meanwhile
    return total / 1e9


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, all threads."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
