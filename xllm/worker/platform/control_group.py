"""How much memory this process's control groups leave: version 2, version 1, and both at once.

Reads files, decides nothing. The page cache of files counts as used in a group's books, but the
kernel gives it back before it refuses memory: it is free here. Invariant: every group from the
process's own to the root of the mount is looked at, for a limit binds all below it.
"""

from __future__ import annotations

import dataclasses
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
    for line in _read(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts, version = [root, root / "unified"], _V2
        elif "memory" in controllers.split(","):
            mounts, version = [root / "memory"], _V1
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's: what is there of it is looked at.
            own = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
            for group in dict.fromkeys((own, *own.parents)):
                memory = _read_group(mount / group, version)
                if memory is not None:
                    found.append(memory)
    return found


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
