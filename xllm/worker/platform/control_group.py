"""How much memory and how many CPUs this process's control groups leave: version 2, version 1, and
both at once.

Reads files, decides nothing. The page cache of files counts as used in a group's books, but the
kernel gives it back before it refuses memory: it is free here. Invariant: every group from the
process's own to the root of the mount is looked at, for a limit binds all below it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


@dataclasses.dataclass(frozen=True, slots=True)
class GroupMemory:
    """Bytes: a group's limit, and what of it is free or can be made free."""

    limit_bytes: int
    free_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Version:
    """The files of a hierarchy's groups. `stat_prefix` names the sums over a group's children."""

    limit: str
    used: str
    stat_prefix: str


_V2 = _Version("memory.max", "memory.current", "")
_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def group_memory(root: Path, membership: Path) -> list[GroupMemory]:
    """The limits on the process that `membership` (/proc/self/cgroup) is of, with the groups
    mounted at `root` (/sys/fs/cgroup); empty where there are none."""
    found = []
    for directory, is_v2 in _groups(root, membership, "memory"):
        memory = _read_group(directory, _V2 if is_v2 else _V1)
        if memory is not None:
            found.append(memory)
    return found


def group_cpus(root: Path, membership: Path) -> float:
    """The CPUs' time that the tightest of those groups gives the process, in CPUs; infinity where
    none has a limit."""
    tightest = math.inf
    for directory, is_v2 in _groups(root, membership, "cpu"):
        if is_v2:
            numbers = _read(directory / "cpu.max").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            numbers = [_read(directory / name).strip() for name in names]
        if len(numbers) == 2 and all(number.isdigit() and int(number) for number in numbers):
            tightest = min(tightest, int(numbers[0]) / int(numbers[1]))
    return tightest


def _groups(root: Path, membership: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The directories of the process's groups for a controller, and whether they are of version
    2."""
    for line in _read(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        is_v2 = number == "0" and not controllers
        if is_v2:
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        for mount in dict.fromkeys(mounts):
            # In a container the path may be the host's: what is there of it is looked at.
            own = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
            for group in dict.fromkeys((own, *own.parents)):
                yield mount / group, is_v2


def _read_group(directory: Path, version: _Version) -> GroupMemory | None:
    limit = _read(directory / version.limit).strip()
    used = _read(directory / version.used).strip()
    if not limit.isdigit() or not used.isdigit():
        return None  # "max", or the root group, which has no such files
    cached = 0
    wanted = (f"{version.stat_prefix}inactive_file", f"{version.stat_prefix}active_file")
    for line in _read(directory / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key in wanted:
            cached += int(value)
    taken = max(int(used) - cached, 0)
    return GroupMemory(int(limit), max(int(limit) - taken, 0))


def _read(path: Path) -> str:
    """A file's text; "" where there is none: hierarchies differ in what they have."""
    try:
        return path.read_text()
    except OSError:
        return ""
