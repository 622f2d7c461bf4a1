"""`xllm status`: the cluster as a router sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import msgspec

from xllm.cli.client_flags import service_options
from xllm.client.synchronous import Client
from xllm.protocol.questions import ProcessStatus

_HEADINGS = ("name", "kind", "role", "model", "state", "waiting", "running", "KV used", "seen")

_FILE_WIDTH = 240
"""Columns where the output is no terminal: wide enough to cut nothing."""


@click.command()
@service_options
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def status(connect: Callable[[], Client], as_json: bool) -> None:
    """Show the processes of a service, who leads, roles and load, and what is amiss."""
    with connect() as client:
        processes = client.status()
        degraded = client.health().degraded
        if client.left:
            told = (*client.left, f"{client.endpoint} was asked instead")
            click.echo("; ".join(told), err=True)
    if as_json:
        full = [{name: getattr(p, name) for name in p.__struct_fields__} for p in processes]
        click.echo(msgspec.json.encode(full).decode())
        return
    _show_table(processes)
    for part in degraded:
        click.echo(f"degraded: {part}")


def status_row(process: ProcessStatus) -> tuple[str, ...]:
    """A process's line in the table."""
    used = ""
    if process.num_blocks and process.state != "unknown":  # it has not said yet what is free
        share = 1 - process.num_free_blocks / process.num_blocks
        used = f"{100 * share:.0f}% of {process.num_blocks}"
    return (
        process.name,
        process.kind,
        f"{process.role} (epoch {process.epoch})" if process.epoch else process.role,
        process.model,
        f"{process.state}, breaker {process.breaker}" if process.breaker else process.state,
        str(process.num_waiting),
        str(process.num_running),
        used,
        _ago(process.heartbeat_age_ms),
    )


def _ago(age_ms: int) -> str:
    if age_ms < 10_000:
        return f"{age_ms} ms ago"
    return f"{age_ms // 1000} s ago" if age_ms < 120_000 else f"{age_ms // 60_000} min ago"


def _show_table(processes: Sequence[ProcessStatus]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in _HEADINGS:
        right = heading in ("waiting", "running")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for process in processes:
        table.add_row(*(Text(cell) for cell in status_row(process)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table)
