"""`xllm node start|stop|status FILE`: the processes of one bare-metal node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from xllm.cli.node_file import NodeFile, NodeProcess, read_node_file
from xllm.cli.node_process import (
    changed_settings,
    files_of,
    prepare_directories,
    running_pid,
    stop_process,
    write_config,
)
from xllm.config.load import load
from xllm.errors import ConfigError

EXIT_NOT_RUNNING = 3
"""As the Linux Standard Base has it for `status`."""
_STOP_ORDER = ("router", "master", "worker", "kvcache", "registry")
_STOP_GRACE_S = 5.0


@click.group()
def node() -> None:
    """Start, stop and look at the processes that a node file describes."""


@node.command(short_help="Start what FILE describes and does not run yet.")
@click.argument("file")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds a process may take.")
def start(file: str, timeout: float) -> None:
    """Start what FILE describes and does not run yet; one line a process, once it is ready. Where
    something runs with other settings than FILE has now, nothing is started, and the code is 64."""
    from xllm.cli.node_start import NodeStarter

    described = read_node_file(file)
    prepare_directories(described)
    _refuse_changes(described)
    for process in described.processes:
        if not running_pid(files_of(described, process)):
            _check(file, process, write_config(described, process))  # before anything runs
    asyncio.run(NodeStarter(described, timeout, click.echo).start_all())


@node.command(short_help="Stop what FILE describes, the registry last.")
@click.argument("file")
def stop(file: str) -> None:
    """Stop what FILE describes: routers drain first, the registry ends last."""
    described = read_node_file(file)
    order = sorted(described.processes, key=lambda process: _STOP_ORDER.index(process.role))
    for process in order:
        files = files_of(described, process)
        how = stop_process(files, _drain_s(process) + _STOP_GRACE_S)
        click.echo(f"{process.name}: {how}")


@node.command()
@click.argument("file")
def status(file: str) -> int:
    """Say what of FILE runs; exit code 3 where something does not."""
    return show_status(read_node_file(file))


def show_status(described: NodeFile) -> int:
    """Print a line a process; returns the exit code."""
    code = 0
    for process in described.processes:
        files = files_of(described, process)
        if pid := running_pid(files):
            click.echo(f"{process.name}: runs (pid {pid})")
            continue
        code = EXIT_NOT_RUNNING
        gone = " (it ended on its own)" if files.pid.exists() else ""
        click.echo(f"{process.name}: does not run{gone}")
    return code


def _refuse_changes(described: NodeFile) -> None:
    """ConfigError where something runs with other settings than the file says now: started beside
    it, the rest might not even be in its cluster."""
    changed = []
    for process in described.processes:
        pid = running_pid(files_of(described, process))
        keys = ", ".join(changed_settings(described, process)) if pid else ""
        if keys:
            changed.append(f"{process.name} (pid {pid}) runs with other settings: {keys}")
    if changed:
        raise ConfigError(
            f"{'; '.join(changed)}. Nothing was started: `xllm node stop` and `xllm node start` "
            "apply the file"
        )


def _check(file: str, process: NodeProcess, config: Path) -> None:
    """ConfigError, which names the node file, where a process would refuse its settings."""
    where = f"{file}, process {process.name}"
    try:
        settings = load({}, str(config))
    except ConfigError as error:
        # What is wrong stands in the user's file, whichever we made of it.
        text = error.message.replace(str(config), where)
        raise ConfigError(
            text if where in text else f"{where}: {text}", param=error.param
        ) from error
    if process.role != "worker" and not settings.cluster.registry:
        raise ConfigError(f"{where}: [cluster] registry is missing", param="cluster.registry")


def _drain_s(process: NodeProcess) -> float:
    shutdown_s = process.sections.get("cluster", {}).get("shutdown_s", 15.0)
    if isinstance(shutdown_s, bool) or not isinstance(shutdown_s, int | float):
        raise ConfigError("cluster.shutdown_s must be a number", param="cluster.shutdown_s")
    return float(shutdown_s)
