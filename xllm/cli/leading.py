"""`xllm role` and `xllm slo`: what the leader of a cluster does for its operator."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import click

from xllm.cli.client_flags import service_options
from xllm.client.synchronous import Client
from xllm.errors import BrokenError, DeadlineError, UnavailableError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
MAX_MS = 3_600_000
WAIT_S = 30.0
"""Longer than an election takes under leases of `cluster.lease_s`, as it is unless it is set."""
MAX_WAIT_S = 3600.0
PAUSE_S = 0.5
MIN_ASK_S = 1.0
"""What an answer may take however little of the wait is left."""
_LEADER = re.compile(r"^this router does not lead; .+ at (tcp://\S+) does: ask there$")


class Connect(Protocol):
    """Of `service_options`: a client of the router at `at`, or of those of --endpoint, whose calls
    take `longest_s` seconds or --timeout at most."""

    def __call__(self, at: str = "", longest_s: float = ...) -> Client: ...


def ask_leader(
    connect: Connect,
    ask: Callable[[Client], T],
    wait_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The leader's answer. Where a router says who leads, and at which address, that one is asked
    at once; where nobody leads, or who does cannot be reached or has not taken it, it is asked
    again for `wait_s` seconds, each time for what is left of them (MIN_ASK_S at least).
    UnavailableError: nobody took it until then. Other errors: as of `ask`, at once; BrokenError,
    too, and DeadlineError before the time is over, where it is a router of --endpoint."""
    deadline = clock() + wait_s
    at, is_told = "", False
    while True:
        try:
            with connect(at, max(deadline - clock(), MIN_ASK_S)) as client:
                return ask(client)
        except UnavailableError as error:
            refusal, named = error.message, _LEADER.match(error.message)
        except (BrokenError, DeadlineError) as error:
            if not at and (isinstance(error, BrokenError) or clock() < deadline):
                raise
            silent = f"the leader at {at}" if at else "the router"
            refusal, named = f"{silent} does not answer: {error.message}", None
        if named is not None and not at:
            at = named[1]
            continue
        if clock() + PAUSE_S > deadline:
            raise UnavailableError(f"{refusal} (waited {wait_s:g} s: --wait)")
        if not is_told:
            click.echo(f"{refusal}; waiting up to {wait_s:g} s", err=True)
        is_told, at = True, ""
        sleep(PAUSE_S)


def leader_options(function: F) -> F:
    """Decorator: where the service is, and how long to wait for its leader."""
    option = click.option(
        "--wait", "wait_s", type=click.FloatRange(0, MAX_WAIT_S), default=WAIT_S,
        show_default=True, metavar="S", help="Longest wait for a router that leads.",
    )  # fmt: skip
    return service_options(option(function))


@click.command()
@click.argument("instance")
@click.argument("role")
@leader_options
def role(connect: Connect, instance: str, role: str, wait_s: float) -> None:
    """Say what INSTANCE is for: both, prefill or decode. The router that leads is asked."""
    ask_leader(connect, lambda client: client.assign_role(instance, role), wait_s)
    click.echo(f"{instance} is for {role}")


@click.command()
@leader_options
@click.option(
    "--ttft-ms", type=click.IntRange(0, MAX_MS), metavar="MS",
    help="Objective for the first token; 0: each instance's own. [default: as it is]",
)  # fmt: skip
@click.option(
    "--tpot-ms", type=click.IntRange(0, MAX_MS), metavar="MS",
    help="Objective for each later token; 0: each instance's own. [default: as it is]",
)  # fmt: skip
def slo(connect: Connect, ttft_ms: int | None, tpot_ms: int | None, wait_s: float) -> None:
    """Set the objectives of requests that name none, and show both. The router that leads is asked
    to change them."""
    ttft_ms, tpot_ms = ask_leader(
        connect,
        lambda client: client.set_objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
        wait_s,
    )
    click.echo(f"ttft_ms {_objective(ttft_ms)}, tpot_ms {_objective(tpot_ms)}")


def _objective(value_ms: int) -> str:
    return str(value_ms or "0 (each instance's own)")
