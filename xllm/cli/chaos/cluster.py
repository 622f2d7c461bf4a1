"""A cluster for chaos: `xllm serve` as a child, its processes by name, its logs.

It knows what its launcher shows and what /proc says, nothing of requests. Invariant: when `stop`
returns, no process of it is left; what was left is in `leftovers`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from xllm.cli.chaos.events import EventLog, FileTail
from xllm.cli.chaos.options import ChaosOptions
from xllm.cli.chaos.processes import descendants, is_alive, start_child
from xllm.cli.startup import ready_word
from xllm.errors import DeadlineError, DependencyError

READY_S = 120.0
STOP_S = 40.0
POLL_S = 0.01
_LINE = re.compile(r"(\w+)\s+(\S+): (\w+) \(pid (\d+)\)")


@dataclasses.dataclass
class KnownProcess:
    """A process as its launcher showed it last."""

    kind: str
    name: str
    pid: int
    is_ready: bool = False


class ChaosCluster:
    """Real processes on this machine."""

    def __init__(self, options: ChaosOptions) -> None:
        self.options = options
        self.directory = Path(tempfile.mkdtemp(prefix="xc-", dir="/tmp"))
        self.run_base = self.directory / "r"
        self.log_dir = self.directory / "log"
        self.processes: dict[str, KnownProcess] = {}
        self.http = ""
        """Where all routers listen to HTTP."""
        self.zmq: list[str] = []
        """Where each of them listens to ZeroMQ."""
        self.named_registry = ""
        """Address of the registry, where it is not the launcher's own."""
        self.wrapper: tuple[str, ...] = ()
        """A command that starts each process and becomes it."""
        self.events = EventLog(self.log_dir)
        self.leftovers: list[str] = []
        self._launcher: subprocess.Popen[bytes] | None = None
        self._shown = FileTail(self.directory / "launcher.out")
        self._seen: set[int] = set()

    # -- life ----------------------------------------------------------------------------------

    async def start(self, flags: tuple[str, ...] = ()) -> None:
        """Returns when the service is ready; DependencyError where it does not become so. `flags`:
        further ones of its launcher."""
        self._launcher = start_child(self._serve(flags), self.directory / "launcher.out")
        try:
            await self.until(self._has_announced, READY_S, "the start of the cluster")
        except DeadlineError as error:
            raise DependencyError(f"{error.message}: {self.launcher_text()[-500:]}") from error

    async def stop(self) -> int:
        """End it in order; returns the launcher's exit code."""
        launcher = self._launcher
        if launcher is None:
            return 0
        self._note_family()
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGINT)
        try:
            await self.until(lambda: launcher.poll() is not None, STOP_S, "the launcher's end")
        except DeadlineError:
            self.leftovers.append("the launcher did not end")
            launcher.kill()
        code = launcher.wait()
        await self.check_gone(2.0)
        return code

    async def check_gone(self, seconds: float) -> None:
        """Notes which processes and sockets there still are after so long, and ends them."""
        try:
            await self.until(lambda: not self.living(), seconds, "the end of all processes")
        except DeadlineError:
            for pid in self.living():
                self.leftovers.append(f"process {pid}")
                os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Delete its directory, unless it was asked for."""
        if not self.options.keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- looking -------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """Wait until it holds, reading along; returns how long that took. DeadlineError."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise DeadlineError(f"{what} did not come within {seconds:g} s")
            await asyncio.sleep(POLL_S)
            self.read()
        return time.monotonic() - began

    def read(self) -> None:
        """Take in what the launcher showed and the processes logged."""
        for line in self._shown.lines():
            found = _LINE.match(line)
            if found is not None:
                is_ready = found[3] == ready_word(found[1])
                self._show(found[1], found[2], is_ready, int(found[4]))
            self._read_address(line)
        self.events.read()

    @property
    def launcher_pid(self) -> int:
        """Pid of `xllm serve`."""
        assert self._launcher is not None
        return self._launcher.pid

    def launcher_text(self) -> str:
        """All that it showed."""
        return (self.directory / "launcher.out").read_text(errors="replace")

    def named(self, kind: str) -> list[KnownProcess]:
        """Processes of a kind, by name."""
        found = [one for one in self.processes.values() if one.kind == kind]
        return sorted(found, key=lambda one: one.name)

    def is_whole(self) -> bool:
        """Whether every process that was ever there lives and is ready."""
        return all(one.is_ready and is_alive(one.pid) for one in self.processes.values())

    @property
    def registry(self) -> str:
        """Where further processes find the registry."""
        return self.named_registry or self.socket_address("registry")

    def socket_address(self, name: str) -> str:
        """Where a process of it listens, in the launcher's run directory."""
        found = sorted(self.run_base.glob(f"run-*/{name}"))
        return f"ipc://{found[-1] if found else self.run_base / name}"

    def living(self) -> list[int]:
        """Processes that this cluster ever had, as far as they were seen, and that live."""
        self._note_family()
        return [pid for pid in sorted(self._seen) if is_alive(pid)]

    def _note_family(self) -> None:
        if self._launcher is not None and self._launcher.poll() is None:
            self._seen.update(descendants(self._launcher.pid))
        self._seen.update(one.pid for one in self.processes.values())

    def _has_announced(self) -> bool:
        if self._launcher is not None and self._launcher.poll() is not None:
            raise DependencyError(
                f"the cluster did not start (exit code {self._launcher.returncode}): "
                f"{self.launcher_text()[-500:]}"
            )
        return len(self.zmq) == self.options.routers and self.is_whole()

    def _show(self, kind: str, name: str, is_ready: bool, pid: int) -> None:
        one = self.processes.setdefault(name, KnownProcess(kind, name, pid))
        one.pid = pid
        one.is_ready = is_ready

    def _read_address(self, line: str) -> None:
        words = line.split()
        if len(words) != 2:
            return
        if words[0] == "HTTP":
            self.http = words[1]
        elif words[0] == "ZeroMQ":
            self.zmq.append(words[1])

    @property
    def python(self) -> list[str]:
        """The command that runs a module of this package as a process of the cluster."""
        return [*self.wrapper, sys.executable, "-m"]

    def shared_flags(self) -> list[str]:
        """Flags that hold for every instance, whoever starts it."""
        options = self.options
        flags = ["--cluster-name", self.directory.name, "--log-dir", str(self.log_dir)]
        flags += ["--log-level", "info", "--cluster-log-format", "json", "--chaos-hooks"]
        flags += ["--engine", options.engine]
        if options.model:
            flags += ["--model", options.model]
        if options.engine == "toy":
            flags += ["--worker-toy-step-ms", f"{options.step_ms:g}"]
            return [*flags, "--scheduler-profile-ms", "0"]
        return [*flags, "--deterministic"]

    def _serve(self, extra: tuple[str, ...]) -> list[str]:
        options = self.options
        command = [*self.python, "xllm.cli.chaos.launching", *self.shared_flags()]
        command += ["--port", "0", "--zmq-port", "0", "--instances", str(options.instances)]
        command += ["--serve-routers", str(options.routers)]
        # Names that proxies are made for, in a cluster that no other run is in.
        router = "router" if options.routers > 1 else "router-0"
        command += ["--master-name", "instance", "--router-name", router]
        command += ["--kvcache-name", "kvcache-0", "--cluster-run-dir", str(self.run_base)]
        if self.named_registry:
            command += ["--registry", self.named_registry]
        return [*command, *options.flags, *extra]
