"""Endpoints: what may be bound, and the lock that keeps an ipc path ours.

ipc and inproc addresses and loopback TCP are always allowed; any other address needs keys.
A second bind of an ipc path would silently steal it, so each bound path has a lock file that is
held as long as the socket lives; a path whose lock is free is stale and is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat

from xllm.config.exposure import is_loopback
from xllm.errors import ConfigError, NameTakenError

MAX_IPC_PATH_BYTES = 107
WHICH_ADDRESS = "the ZeroMQ address is the one that `xllm serve` prints as ZeroMQ"
_KEY_MARK = ";key="
_PUBLIC_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_HOST_AND_PORT = re.compile(r"[^\s/]+:(\d{1,5})")
_LOCK_FLAGS = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


def split_key(address: str, param: str) -> tuple[str, str]:
    """(endpoint, public key or "") of an address as settings have it; ConfigError, which names
    the setting, for what is no key."""
    endpoint, mark, server_key = address.partition(_KEY_MARK)
    if mark:
        check_public_key(server_key, param)
    return endpoint, server_key


def own_endpoint(configured: str, run_dir: str, name: str) -> str:
    """The endpoint that is configured, or the socket of that name in the run directory;
    ConfigError where there is neither."""
    if configured:
        return configured
    if not run_dir:
        raise ConfigError(
            f"{name} has no endpoint, and cluster.run_dir is not set", param="cluster.run_dir"
        )
    return f"ipc://{run_dir}/{name}"


def check_public_key(text: str, param: str) -> None:
    """ConfigError, which names the setting, for what is no public key."""
    if not _PUBLIC_KEY.fullmatch(text):
        raise ConfigError(
            f"{param}: a public key is 40 characters of Z85, not these {len(text)} "
            "(quote it: it holds signs of the shell)",
            param=param,
        )


def check_tcp_port(endpoint: str, param: str) -> None:
    """ConfigError, which names the setting, for a tcp endpoint that nobody can connect to: one
    without a host, or without a port from 1 to 65535."""
    scheme, _, rest = endpoint.partition("://")
    if scheme != "tcp":
        return
    match = _HOST_AND_PORT.fullmatch(rest)
    if match is None or not 0 < int(match[1]) < 65536:
        raise ConfigError(
            f"{param}: {endpoint!r} is not tcp://host:port with a port from 1 to 65535",
            param=param,
        )


def check_service_endpoint(endpoint: str, param: str) -> None:
    """ConfigError, which names the setting or argument, for what cannot be a service's address."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "tcp":
        check_tcp_port(endpoint, param)
    elif scheme != "ipc" or not rest:
        hint = f"; {WHICH_ADDRESS}" if scheme in ("http", "https") else ""
        raise ConfigError(
            f"{param}: {endpoint!r} is not tcp://host:port or ipc://path{hint}", param=param
        )


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach the endpoint: ipc, inproc, or loopback TCP."""
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    if scheme != "tcp":
        raise ConfigError(f"endpoint {endpoint!r}: only ipc, inproc and tcp are spoken")
    return is_loopback(rest.rsplit(":", 1)[0])


def check_bindable(endpoint: str, *, has_keys: bool) -> None:
    """Refuse what would let strangers in. Raises ConfigError."""
    if not is_local(endpoint) and not has_keys:
        raise ConfigError(
            f"{endpoint} is reachable from other machines: it needs keys (--cluster-keys-dir)"
        )
    scheme, _, path = endpoint.partition("://")
    if scheme == "ipc" and len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
        raise ConfigError(f"ipc path of {len(path)} characters: {MAX_IPC_PATH_BYTES} at most")
    if scheme == "ipc":
        _check_folder(os.path.dirname(path) or ".")


def _check_folder(folder: str) -> None:
    """Refuse a directory in which any user may replace our socket. (One that is absent is refused
    by the bind.)"""
    try:
        mode = os.stat(folder).st_mode
    except OSError:
        return
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ConfigError(f"{folder} may be written by everybody: no place for a socket")


class PathLock:
    """Holds `<path>.lock`, which says the process's id, while an ipc socket is bound at `path`.
    NameTakenError where a living process holds it: paths are made of names."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path + ".lock", _LOCK_FLAGS, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace")
            os.close(self._fd)
            raise NameTakenError(
                f"{path} is in use by {f'process {holder}' if holder else 'another process'}: stop "
                "that one, or give this one another name or another directory than "
                f"{os.path.dirname(path) or '.'}"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        if os.path.lexists(path):
            os.unlink(path)

    def release(self) -> None:
        """Remove the path and the lock."""
        for name in (self._path, self._path + ".lock"):
            try:
                os.unlink(name)
            except FileNotFoundError:
                pass  # a sweep of the run directory was faster
        os.close(self._fd)
