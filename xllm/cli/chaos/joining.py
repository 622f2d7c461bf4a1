"""Instances that join a running cluster from beside its launcher, and leave it again."""

from __future__ import annotations

import os
import signal
import subprocess

from xllm.cli.chaos.cluster import ChaosCluster
from xllm.cli.chaos.processes import descendants, is_alive, start_child

LEAVE_S = 30.0


class Newcomer:
    """One instance: a master of its own, with its worker. `flags`: further ones of it; `wrapper`:
    a command that starts it and becomes it. `close` it."""

    def __init__(
        self,
        cluster: ChaosCluster,
        name: str,
        *,
        flags: tuple[str, ...] = (),
        wrapper: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self._cluster = cluster
        self._flags = flags
        self._wrapper = wrapper
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    def start(self) -> None:
        """Start it; it joins once its worker is ready."""
        cluster = self._cluster
        run_dir = cluster.directory / self.name
        run_dir.mkdir(mode=0o700, exist_ok=True)
        command = [*self._wrapper, *cluster.python, "xllm.cli.chaos.newcomer"]
        command += ["--master-name", self.name, "--cluster-run-dir", str(run_dir)]
        command += ["--registry", cluster.registry, *cluster.shared_flags(), *self._flags]
        self._process = start_child(command, cluster.directory / f"{self.name}.out")

    @property
    def pid(self) -> int:
        """Of its master."""
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether its master is gone."""
        return self._process is None or self._process.poll() is not None

    async def leave(self) -> None:
        """SIGTERM: what it runs ends there. DeadlineError where it does not leave."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGTERM)
        await self._cluster.until(lambda: not self._living(), LEAVE_S, f"the end of {self.name}")

    def close(self) -> None:
        """End what is left of it."""
        for pid in self._living():
            os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _living(self) -> list[int]:
        if not self.has_ended:
            self._seen.update(descendants(self.pid))
        return [pid for pid in sorted(self._seen) if is_alive(pid)]
