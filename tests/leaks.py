"""What a test run holds at one moment: processes, descriptors, shared memory."""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from multiprocessing import resource_tracker

MARK = "PYTEST_LEAK_MARK"
"""Variable that every process a test starts inherits, and each of theirs: orphans are found."""
_SHARED_MEMORY = ("xllm", "psm_", "mp-", "sem.", "torch_")


class Leaks:
    """What this process and its descendants hold at one moment."""

    def __init__(self) -> None:
        self.processes = _marked_processes()
        self.descriptors = _descriptors()
        self.names = {name for name in os.listdir("/dev/shm") if name.startswith(_SHARED_MEMORY)}

    def since(self, before: Leaks) -> list[str]:
        """What is new, in words."""
        words = [
            f"process {pid} ({command})"
            for pid, command in self.processes.items()
            if pid not in before.processes
        ]
        new = self.descriptors - before.descriptors
        words += [f"{count} descriptors of {kind}" for kind, count in new.items()]
        words += [f"/dev/shm/{name}" for name in sorted(self.names - before.names)]
        return words


def _marked_processes() -> dict[int, str]:
    """Processes of this run: pid and command. multiprocessing's tracker lives as long as we."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (os.getpid(), tracker):
            continue
        try:
            if mark not in pathlib.Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                continue
            command = pathlib.Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:
            continue  # somebody else's, or gone meanwhile
        found[int(name)] = command.replace(b"\0", b" ").decode(errors="replace")[:120]
    return found


def _descriptors() -> Counter[str]:
    """How many descriptors of each kind: files by path, the rest by type."""
    tracker = getattr(resource_tracker._resource_tracker, "_fd", None)
    kinds: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        if int(name) == tracker:
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(("/dev/", "/usr/", "/proc/")) or target.endswith((".so", ".py")):
            continue  # libraries open these once and keep them
        kinds[target.split(":[")[0]] += 1
    return kinds
