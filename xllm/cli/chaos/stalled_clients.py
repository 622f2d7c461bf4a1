"""Clients that ask over ZeroMQ and read nothing of their answers: a process of its own, whose loop
stands while ZeroMQ's threads go on and answer pings. Run as a module, by `clients` only.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import click

from xllm.cli.chaos.silent_asker import ask_for_nobody
from xllm.client.asynchronous import AsyncClient
from xllm.config.environment import prepare_environment

STALLED = "stalled"


@click.command()
@click.argument("endpoint")
@click.argument("num_clients", type=int)
@click.argument("num_tokens", type=int)
def stall(endpoint: str, num_clients: int, num_tokens: int) -> None:
    """So many clients of one router begin a stream each; then none of them reads."""
    asyncio.run(_stall(endpoint, num_clients, num_tokens))


async def _stall(endpoint: str, num_clients: int, num_tokens: int) -> None:
    clients = [AsyncClient(endpoint, discover=False) for _ in range(num_clients)]
    begun = [ask_for_nobody(one, index, num_tokens) for index, one in enumerate(clients)]
    await asyncio.gather(*(one.begun for one in begun))
    click.echo(STALLED)
    signal.pause()  # for good, in the loop's own thread


if __name__ == "__main__":
    prepare_environment()
    sys.exit(stall.main(standalone_mode=False))
