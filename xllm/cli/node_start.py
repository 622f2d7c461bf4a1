"""Starting a node: its processes one role after the other, until all of them report ready.

It listens where the processes report their start, and ends when all did, or when one failed or
took too long: what runs then keeps running, detached, and is seen by `node status`.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable

from xllm.cli.node_file import NodeFile, NodeProcess
from xllm.cli.node_process import (
    files_of,
    last_line,
    running_pid,
    start_detached,
    write_config,
)
from xllm.cli.startup import ready_word
from xllm.cli.supervision import describe_exit
from xllm.errors import DependencyError, error_from_exit_code
from xllm.protocol.actor.base import Actor
from xllm.protocol.codec import Decoder
from xllm.protocol.launch import LaunchMessage, ProcessFailed, ProcessReady
from xllm.protocol.transport.router import RouterSocket

_POLL_S = 0.05


class NodeStarter(Actor):
    """Starts what does not run yet. `say` is called with a line a process."""

    def __init__(self, node: NodeFile, timeout_s: float, say: Callable[[str], None]) -> None:
        super().__init__("node-start")
        self._node = node
        self._timeout_s = timeout_s
        self._say = say
        self._ready: dict[int, ProcessReady] = {}
        self._failures: dict[str, str] = {}
        """Why processes ended, by name, as they reported it last."""
        self._reports: RouterSocket[LaunchMessage] | None = None

    async def start(self) -> None:
        """Listen to reports, and begin."""
        self._reports = RouterSocket(
            self.transport,
            f"ipc://{self._node.run_dir}/node-start",
            Decoder(LaunchMessage),
            lambda identity, message, frames: self._report(message),
        )

    async def stop(self) -> None:
        """Listen no more."""
        if self._reports is not None:
            self._reports.close()

    async def start_all(self) -> None:
        """Start the processes, role by role. The first that fails is named by an error with its
        exit code, one that is not ready in time by a DependencyError."""
        await self.open()
        try:
            for process in self._node.processes:
                await self._start_one(process)
        finally:
            await self.close()

    async def _start_one(self, process: NodeProcess) -> None:
        files = files_of(self._node, process)
        if pid := running_pid(files):
            self._say(f"{process.name}: runs already (pid {pid})")
            return
        assert self._reports is not None
        config = write_config(self._node, process, self._reports.endpoint)
        started = start_detached(self._node, process, config)
        try:
            async with asyncio.timeout(self._timeout_s):
                ready = await self._wait_ready(started)
        except TimeoutError:
            raise DependencyError(
                f"{process.name} (pid {started.pid}) is not ready after {self._timeout_s:g} s; "
                f"see {files.log}"
            ) from None
        if ready is None:
            files.pid.unlink(missing_ok=True)
            reason = self._failures.get(process.name) or last_line(files).removeprefix("xllm: ")
            raise error_from_exit_code(
                started.returncode,
                f"{process.name} ended with {describe_exit(started.returncode)}: "
                f"{reason} ({files.log})",
            )
        where = ", ".join(f"{what} {address}" for what, address in ready.addresses)
        word = ready_word(ready.kind)
        self._say(f"{process.name}: {word} (pid {started.pid}) {where}".rstrip())

    async def _wait_ready(self, started: subprocess.Popen[bytes]) -> ProcessReady | None:
        """The process's word that it is ready, or None once it ended."""
        while started.pid not in self._ready:
            if started.poll() is not None:
                return None
            await asyncio.sleep(_POLL_S)
        # It outlives us: no warning that nobody waited for it.
        started.returncode = 0
        return self._ready[started.pid]

    def _report(self, message: LaunchMessage) -> None:
        if isinstance(message, ProcessReady):
            self._ready[message.pid] = message
        elif isinstance(message, ProcessFailed):
            self._failures[message.name] = message.message  # said once, when it has ended
