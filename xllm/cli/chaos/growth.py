"""Whether processes grew: sizes and live objects early in a soak, compared with those at its end.
Pure but for `read_objects`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from xllm.cli.chaos.processes import ProcessSize
from xllm.protocol.actor.fault_hooks import objects_file

MOST_RSS_KB = 2048
"""Resident memory may be so much higher at the end."""
MOST_FDS = 8
"""Connections come and go: so many more descriptors are no leak yet."""
OBJECTS_SHARE = 0.02
MOST_OBJECTS = 200
"""Live objects of a type may be more by this share and number: caches fill."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One process at rest: its pid, its size, and its live objects by type."""

    pid: int
    size: ProcessSize
    objects: Mapping[str, int]


def read_objects(log_dir: Path, name: str) -> dict[str, int]:
    """What a process wrote of itself after SIGUSR2; empty where it did not yet."""
    try:
        found = json.loads((log_dir / objects_file(name)).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(key): int(value) for key, value in found.items()}


def compare_sizes(early: Mapping[str, Snapshot], late: Mapping[str, Snapshot]) -> dict[str, object]:
    """Growth of each process that lived all the time, and what was too much, as JSON."""
    processes: dict[str, object] = {}
    too_much: list[str] = []
    for name, before in early.items():
        after = late.get(name)
        if after is None or after.pid != before.pid:
            continue
        types = _grown_types(before.objects, after.objects)
        rss_kb = after.size.rss_kb - before.size.rss_kb
        num_fds = after.size.num_fds - before.size.num_fds
        num_threads = after.size.num_threads - before.size.num_threads
        processes[name] = {
            "rss_kb": after.size.rss_kb, "rss_grown_kb": rss_kb,
            "fds": after.size.num_fds, "fds_grown": num_fds,
            "threads": after.size.num_threads, "threads_grown": num_threads,
            "objects": after.objects.get("total", 0),
            "objects_grown": after.objects.get("total", 0) - before.objects.get("total", 0),
            "types_grown": types,
        }  # fmt: skip
        if rss_kb > MOST_RSS_KB:
            too_much.append(f"{name} grew by {rss_kb} kB, not at most {MOST_RSS_KB}")
        if num_fds > MOST_FDS:
            too_much.append(f"{name} has {num_fds} more descriptors")
        if num_threads > 0:
            too_much.append(f"{name} has {num_threads} more threads")
        too_much += [f"{name} has {count} more objects of {kind}" for kind, count in types.items()]
        if not before.objects or not after.objects:
            too_much.append(f"{name} did not count its objects")
    return {"processes": processes, "too_much": too_much}


def _grown_types(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    grown = {}
    for kind, count in after.items():
        known = before.get(kind, 0)
        if kind != "total" and count - known > MOST_OBJECTS + OBJECTS_SHARE * known:
            grown[kind] = count - known
    return grown
