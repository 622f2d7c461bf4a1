"""Processes of a run: started so that they end with it, and what /proc says of them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def state_of(pid: int) -> str:
    """One letter as in `ps`; empty where there is no such process (or only its remains)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state = text.rpartition(")")[2].split()[0]
    return "" if state in ("Z", "X") else state


def is_alive(pid: int) -> bool:
    """Whether it runs, sleeps or is stopped."""
    return bool(state_of(pid))


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for task in tasks:
            try:
                text = Path(f"/proc/{parent}/task/{task}/children").read_text()
            except OSError:
                continue  # it ended meanwhile
            found += [int(child) for child in text.split()]
    return found


@dataclasses.dataclass(frozen=True)
class ProcessSize:
    """What a process holds. `rss_kb`: resident memory without pages shared with files."""

    rss_kb: int
    num_threads: int
    num_fds: int


def size_of(pid: int) -> ProcessSize | None:
    """None where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        num_fds = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    rss_kb = sum(int(rows.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem"))
    return ProcessSize(rss_kb, int(rows["Threads"]), num_fds)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since its start; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_child(command: list[str], shown: Path) -> subprocess.Popen[bytes]:
    """A child whose output is appended to a file, and which is asked to end with this process."""
    libc = ctypes.CDLL(None)
    with shown.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
