"""`xllm sleep` and `xllm wake`: a model gives its memory away, and takes requests again."""

from __future__ import annotations

from collections.abc import Callable

import click

from xllm.cli.client_flags import service_options
from xllm.client.synchronous import Client


@click.command()
@click.argument("model")
@service_options
@click.option("--drop-weights", is_flag=True, help="Give the weights back, too.")
@click.option(
    "--end-s", type=click.FloatRange(0, 600), default=0.0, metavar="S",
    help="Time for open requests to end; the rest is ended as unavailable. [default: 0]",
)  # fmt: skip
def sleep(connect: Callable[[], Client], model: str, drop_weights: bool, end_s: float) -> None:
    """Put MODEL to sleep: other models get its memory."""
    with connect() as client:
        client.sleep(model, end_s=end_s, drop_weights=drop_weights)
    click.echo(f"{model} is asleep")


@click.command()
@click.argument("model")
@service_options
def wake(connect: Callable[[], Client], model: str) -> None:
    """Wake MODEL; ends once it takes requests."""
    with connect() as client:
        client.wake(model)
    click.echo(f"{model} is awake")
