"""`xllm bench`: the group of its commands."""

from __future__ import annotations

import click

from xllm.cli.bench.serve import serve


@click.group()
def bench() -> None:
    """Measure: a running endpoint, a model on this machine, and the machine itself."""


bench.add_command(serve)
