"""Processes of a node that outlive the command that started them: pid files, logs, signals.

A pid file names a process by pid and start time, so that a pid that was given to somebody else
since is never signalled. It does not know what the processes do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from xllm.cli.node_file import NodeFile, NodeProcess, as_toml
from xllm.errors import ConfigError

_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class ProcessFiles:
    """Where a process of a node keeps its things."""

    config: Path
    pid: Path
    log: Path


def files_of(node: NodeFile, process: NodeProcess) -> ProcessFiles:
    """The files of one process."""
    run_dir = Path(node.run_dir)
    return ProcessFiles(
        run_dir / f"{process.name}.toml",
        run_dir / f"{process.name}.pid",
        Path(node.log_dir) / f"{process.name}.log",
    )


def prepare_directories(node: NodeFile) -> None:
    """Make the run directory (0700, ours) and the log directory, or raise ConfigError."""
    os.makedirs(node.run_dir, mode=0o700, exist_ok=True)
    os.makedirs(node.log_dir, exist_ok=True)
    state = os.stat(node.run_dir)
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ConfigError(f"{node.run_dir} must be this user's alone (0700)", param="node.run_dir")


def write_config(node: NodeFile, process: NodeProcess, launcher: str = "") -> Path:
    """The process's file for --config; `launcher` is where it reports its start."""
    path = files_of(node, process).config
    sections = {key: dict(values) for key, values in process.sections.items()}
    if launcher:
        sections.setdefault("cluster", {})["launcher"] = launcher
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(as_toml(sections))
    return path


def changed_settings(node: NodeFile, process: NodeProcess) -> list[str]:
    """Keys (`section.name`) in which the node file differs from what the process was started with;
    none where that is not on record any more."""
    try:
        text = files_of(node, process).config.read_text(encoding="utf-8")
        recorded = tomllib.loads(text)
    except (OSError, ValueError):
        return []
    before, now = _by_key(recorded), _by_key(tomllib.loads(as_toml(process.sections)))
    before.pop("cluster.launcher", None)  # the one who started it
    return sorted(key for key in before | now if before.get(key) != now.get(key))


def _by_key(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
    }


def start_detached(node: NodeFile, process: NodeProcess, config: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output in its log, and note its pid."""
    files = files_of(node, process)
    with open(files.log, "ab") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "xllm", process.role, "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    files.pid.write_text(f"{started.pid} {start_time(started.pid)}\n", encoding="ascii")
    return started


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none (or a zombie)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def running_pid(files: ProcessFiles) -> int:
    """The pid of the process that the pid file names, if that one still runs; else 0."""
    try:
        pid, started = map(int, files.pid.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 0
    return pid if pid > 0 and started and start_time(pid) == started else 0


def last_line(files: ProcessFiles) -> str:
    """The last line of the log: the usual place of the reason."""
    try:
        lines = files.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def stop_process(files: ProcessFiles, timeout_s: float) -> str:
    """End a process: SIGTERM, and SIGKILL after `timeout_s`. Says how it went."""
    pid = running_pid(files)
    how = "was not running"
    if pid:
        how = "stopped"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _wait_gone(files, timeout_s):
            how = f"killed after {timeout_s:g} s"
            # It leads a session and process group of its own; its children die with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _wait_gone(files, timeout_s)
    files.pid.unlink(missing_ok=True)
    files.config.unlink(missing_ok=True)
    return how


def _wait_gone(files: ProcessFiles, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while running_pid(files):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
