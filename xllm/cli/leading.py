"""`xllm role` and `xllm slo`: what the leader of a cluster does for its operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, TypeVar

import click

from xllm.cli.client_flags import service_options
from xllm.client.synchronous import Client
from xllm.errors import UnavailableError

T = TypeVar("T")
MAX_MS = 3_600_000
_LEADER = re.compile(r"^this router does not lead; .+ at (tcp://\S+) does: ask there$")


class Connect(Protocol):
    """Of `service_options`: a client of the router at `at`, or of that of --endpoint."""

    def __call__(self, at: str = "") -> Client: ...


def _ask_leader(connect: Connect, ask: Callable[[Client], T]) -> T:
    """The leader's answer: where a router says who leads, and at which address, that one is asked,
    once. Errors: as of `ask`; the refusal itself where it names no address."""
    try:
        with connect() as client:
            return ask(client)
    except UnavailableError as error:
        found = _LEADER.match(error.message)
        if found is None:
            raise
    with connect(found[1]) as client:
        return ask(client)


@click.command()
@click.argument("instance")
@click.argument("role")
@service_options
def role(connect: Connect, instance: str, role: str) -> None:
    """Say what INSTANCE is for: both, prefill or decode. The router that leads is asked."""
    _ask_leader(connect, lambda client: client.assign_role(instance, role))
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
def slo(connect: Connect, ttft_ms: int | None, tpot_ms: int | None) -> None:
    """Set the objectives of requests that name none, and show both. The router that leads is asked
    to change them."""
    ttft_ms, tpot_ms = _ask_leader(
        connect, lambda client: client.set_objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    )
    click.echo(f"ttft_ms {ttft_ms}, tpot_ms {tpot_ms}")
