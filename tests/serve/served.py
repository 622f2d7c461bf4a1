"""A running `xllm serve` for tests: its addresses, its processes, its end."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Self

from xllm.cli.startup import ready_word

READY_S = 60.0


def wait_until(condition, seconds=20.0, what="the condition"):
    """Poll until `condition()` holds; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        threading.Event().wait(0.01)
    return found


class Served:
    """`xllm serve` of a model directory with the toy engine, on free ports."""

    def __init__(self, model: str, run_dir, *flags: str, ready: bool = True) -> None:
        self.run_dir = pathlib.Path(run_dir)
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._began = time.monotonic()
        command = [sys.executable, "-m", "xllm", "serve", "--model", model, "--engine", "toy"]
        command += ["--port", "0", "--zmq-port", "0", "--cluster-run-dir", str(run_dir), *flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()
        self.ready_s = 0.0
        if ready:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    @property
    def text(self) -> str:
        """All that was shown, standard output first."""
        return "\n".join([*self.lines, *self.errors])

    @property
    def zmq(self) -> str:
        """The ZeroMQ endpoint."""
        return re.search(r"ZeroMQ\s+(\S+)", self.text)[1]

    @property
    def http(self) -> str:
        """The HTTP address with /v1."""
        return re.search(r"HTTP\s+(\S+)", self.text)[1]

    def wait_ready(self) -> None:
        """Until the addresses were shown."""

        def shown() -> bool:
            assert self.process.poll() is None, f"it ended: {self.text}"
            return "Ctrl-C stops" in self.lines

        try:
            wait_until(shown, READY_S, "readiness")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from error
        self.ready_s = time.monotonic() - self._began

    def family(self) -> dict[int, str]:
        """Pid and command line of every process of the service."""
        return {pid: read_command(pid) for pid in descendants(self.process.pid)}

    def child(self, kind: str) -> int:
        """Pid of the latest process of a kind, from what the launcher showed."""
        words = f"started|{ready_word(kind)}"
        found = re.findall(rf"^{kind}\s.*: (?:{words}) \(pid (\d+)\)", self.text, re.M)
        return int(found[-1])

    def num_ready(self, kind: str) -> int:
        """How often a process of a kind has started well, from what the launcher showed."""
        return len(re.findall(rf"^{kind}\s.*: {ready_word(kind)} \(pid", self.text, re.M))

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        return code

    def stop(self) -> None:
        """End it, whatever it is doing."""
        if self.process.poll() is None:
            self.interrupt()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL of the launcher."""
        self.process.kill()
        self.wait()

    @staticmethod
    def _read(stream, lines) -> None:
        with stream:
            for line in stream:
                lines.append(line.rstrip("\n"))


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        try:
            children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in children.split()]
    return found


def alive(pids) -> list[int]:
    """Those that run (no zombies)."""
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}") and not _is_zombie(pid)]


def read_command(pid: int) -> str:
    """Command line of a process; empty when it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _is_zombie(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
