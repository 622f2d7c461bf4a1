"""A driver of a peer as a child process: it says READY, then answers each workload's line."""

from __future__ import annotations

import json
import os
import pathlib
import selectors
import subprocess
import time
from typing import Any

STOP_S = 20.0


class PeerError(Exception):
    """A driver ended, or did not answer in time; its log says why."""


class Peer:
    """One driver. `spec`: name, cmd, and optionally env, only (workloads), start_s, cwd. What it
    prints besides the protocol goes to `<logs>/<name>.log`."""

    def __init__(self, spec: dict[str, Any], logs: pathlib.Path) -> None:
        self.name = str(spec["name"])
        self.only: list[str] | None = spec.get("only")
        self._log = (logs / f"{self.name.replace('/', '_')}.log").open("wb")
        self._text = b""
        began = time.monotonic()
        self._process = subprocess.Popen(
            [str(part) for part in spec["cmd"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.get("env", {})},
            cwd=spec.get("cwd"),
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            self.meta = self._read(b"READY ", float(spec.get("start_s", 600)))
        except BaseException:
            self.stop()
            raise
        self.meta["load_s"] = round(time.monotonic() - began, 1)

    def run(self, workload: str, rep: int, limit_s: float = 900) -> dict[str, Any]:
        """The driver's figures of one repetition, or its `error`."""
        assert self._process.stdin is not None
        line = json.dumps({"workload": workload, "rep": rep}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} reads no more") from None
        return self._read(b"RESULT ", limit_s)

    def stop(self) -> None:
        """Ask it to leave, then end it, by its own pid."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b'{"quit": true}\n')
            process.stdin.close()
        except (BrokenPipeError, OSError):
            pass  # it has ended already
        for end in (process.terminate, process.kill):
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                end()
        process.wait()
        self._selector.close()
        process.stdout.close()
        self._log.close()

    def _read(self, tag: bytes, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        while True:
            while b"\n" in self._text:
                line, _, self._text = self._text.partition(b"\n")
                if line.startswith(tag):
                    found: dict[str, Any] = json.loads(line[len(tag) :])
                    return found
                self._log.write(line + b"\n")
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._selector.select(left_s):
                raise PeerError(f"{self.name}: nothing within {limit_s:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise PeerError(f"{self.name} ended; {self._log.name} may say why")
            self._text += piece
