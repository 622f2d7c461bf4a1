"""`xllm bench`: the group of its commands."""

from __future__ import annotations

import click

from xllm.cli.bench.local import latency, throughput
from xllm.cli.bench.roofline import roofline
from xllm.cli.bench.serve import serve


@click.group()
def bench() -> None:
    """Measure: a running endpoint, a model on this machine, and the machine itself."""


for command in (serve, latency, throughput, roofline):
    bench.add_command(command)
