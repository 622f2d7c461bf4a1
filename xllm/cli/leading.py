"""`xllm role` and `xllm slo`: what the leader of a cluster does for its operator."""

from __future__ import annotations

from collections.abc import Callable

import click

from xllm.cli.client_flags import service_options
from xllm.client.synchronous import Client

MAX_MS = 3_600_000


@click.command()
@click.argument("instance")
@click.argument("role")
@service_options
def role(connect: Callable[[], Client], instance: str, role: str) -> None:
    """Say what INSTANCE is for: both, prefill or decode. Asks the router that leads."""
    with connect() as client:
        client.assign_role(instance, role)
    click.echo(f"{instance} is for {role}")


@click.command()
@service_options
@click.option(
    "--ttft-ms", type=click.IntRange(0, MAX_MS), metavar="MS",
    help="Objective for the first token; 0: each instance's own. [default: as it is]",
)  # fmt: skip
@click.option(
    "--tpot-ms", type=click.IntRange(0, MAX_MS), metavar="MS",
    help="Objective for each later token; 0: each instance's own. [default: as it is]",
)  # fmt: skip
def slo(connect: Callable[[], Client], ttft_ms: int | None, tpot_ms: int | None) -> None:
    """Set the objectives of requests that name none, and show both. Asks the router that leads."""
    with connect() as client:
        ttft_ms, tpot_ms = client.set_objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    click.echo(f"ttft_ms {ttft_ms}, tpot_ms {tpot_ms}")
