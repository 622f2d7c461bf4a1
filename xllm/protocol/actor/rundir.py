"""The directory of a run: sockets, locks, stores; 0700, and swept when its owner is dead.

`<base>/run-<random>` holds a `lock` file that its owner keeps locked. A directory whose lock is
free belongs to nobody that lives: the next start removes it. Nothing else depends on them.
Invariant: a directory has that name only once it is locked; it is made under a hidden one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import time

from xllm.errors import ConfigError

_PREFIX = "run-"
_HIDDEN_PREFIX = ".new-"
_HIDDEN_S = 60.0
"""How long a directory may be in the making; one that is older was left by a dead process."""


class RunDirectory:
    """A fresh run directory under `base`, after stale ones there were swept."""

    def __init__(self, base: str) -> None:
        prepare_base(base)
        sweep(base)
        name = secrets.token_hex(6)
        hidden = os.path.join(base, _HIDDEN_PREFIX + name)
        os.mkdir(hidden, 0o700)
        self._lock_fd = _lock(hidden)
        if self._lock_fd < 0:
            raise ConfigError(f"{hidden} was taken by another process")
        self.path = os.path.join(base, _PREFIX + name)
        os.rename(hidden, self.path)

    def ipc(self, name: str) -> str:
        """The ipc endpoint `name` in this directory."""
        return f"ipc://{self.path}/{name}"

    def remove(self) -> None:
        """Delete the directory and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)


def prepare_base(base: str) -> None:
    """Make the parent of run directories (0700), or see that one that is there will do; its mode
    stays as it is. ConfigError where it is not this user's own, or where others may write: they
    could put run directories of theirs there."""
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        info = os.lstat(base)
    except OSError as error:
        raise _refused(base, f"cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise _refused(base, "is no directory")
    mode = f"mode {stat.S_IMODE(info.st_mode):04o}"
    if info.st_uid != os.getuid():
        raise _refused(base, f"is user {info.st_uid}'s ({mode}), not this user's own")
    if info.st_mode & 0o022:
        raise _refused(base, f"is open to others ({mode}): only this user may write there")


def _refused(base: str, why: str) -> ConfigError:
    return ConfigError(f"cluster.run_dir: {base} {why}", param="cluster.run_dir")


def sweep(base: str) -> int:
    """Remove the run directories of dead owners; returns how many."""
    num_swept = 0
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if not _may_be_stale(name, path):
            continue
        fd = _lock(path)
        if fd < 0:
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)
        num_swept += 1
    return num_swept


def _may_be_stale(name: str, path: str) -> bool:
    if name.startswith(_PREFIX):
        return not os.path.islink(path)
    if not name.startswith(_HIDDEN_PREFIX):
        return False
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(info.st_mode) and time.time() - info.st_mtime > _HIDDEN_S


def _lock(path: str) -> int:
    """A descriptor that holds the directory's lock, or -1 where somebody else does."""
    try:
        fd = os.open(
            os.path.join(path, "lock"),
            os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
    except FileNotFoundError:
        return -1  # swept by somebody else meanwhile
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
