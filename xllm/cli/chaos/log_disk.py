"""The place of the logs, and how it gets full.

Where this process may mount, that is a small file system in memory: writes fail with ENOSPC, as on
a full disk. Elsewhere each process gets a limit of no bytes a file (RLIMIT_FSIZE): its writes fail,
with EFBIG, while its disk has room; processes that start later have no such limit.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SIZE = "16m"
_CHUNK = b"\0" * (1 << 16)


class LogDisk:
    """Mount it before the logs begin, and `close` it when all who wrote are gone."""

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        self._directory = directory
        self._filler = directory / "filler"
        self._keep = keep
        self._limited: dict[int, tuple[int, int]] = {}
        self.is_mounted = False

    def mount(self) -> None:
        """A file system of its own, if this process may."""
        self._directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "xllm-chaos"]
        if shutil.which("mount"):
            done = subprocess.run(
                [*command, str(self._directory)], capture_output=True, check=False
            )
            self.is_mounted = done.returncode == 0

    @property
    def means(self) -> str:
        """How it is full, in words."""
        if self.is_mounted:
            return f"a file system of {SIZE} without room (ENOSPC)"
        return f"no byte more a file for {len(self._limited)} processes (EFBIG)"

    def fill(self, pids: Iterable[int]) -> None:
        """From now on these processes cannot write."""
        if not self.is_mounted:
            for pid in pids:
                old = self._limited[pid] = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, old[1]))
            return
        try:
            with self._filler.open("wb", buffering=0) as file:
                while True:
                    file.write(_CHUNK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        # A file may still grow within its last page. Blanks before an event do not hurt it.
        for path in self._directory.glob("*.log"):
            with path.open("ab", buffering=0) as file:
                file.write(b" " * (-path.stat().st_size % mmap.PAGESIZE))

    def is_full(self) -> bool:
        """Whether nothing can be written."""
        if self.is_mounted:
            return os.statvfs(self._directory).f_bavail == 0
        return all(_limit_of(pid) in (0, None) for pid in self._limited)

    def empty(self) -> None:
        """There is room again."""
        self._filler.unlink(missing_ok=True)
        for pid, old in self._limited.items():
            if _limit_of(pid) is not None:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, old)
        self._limited = {}

    def close(self) -> None:
        """Unmount; what was logged stays if it is to be kept."""
        self.empty()
        if not self.is_mounted:
            return
        aside = self._directory.with_name("kept-log")
        if self._keep:
            shutil.copytree(self._directory, aside)
        subprocess.run(["umount", "-l", str(self._directory)], capture_output=True, check=True)
        self.is_mounted = False
        if self._keep:
            shutil.copytree(aside, self._directory, dirs_exist_ok=True)
            shutil.rmtree(aside)


def _limit_of(pid: int) -> int | None:
    """None where the process is gone."""
    try:
        return resource.prlimit(pid, resource.RLIMIT_FSIZE)[0]
    except ProcessLookupError:
        return None
