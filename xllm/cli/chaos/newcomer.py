"""A further instance of a chaos cluster: `xllm master` that may speak as one of another version.
Run as a module, by `joining` only. Its worker speaks as this version does.
"""

from __future__ import annotations

import sys
import typing

import click
import msgspec

from xllm.cli.chaos.other_version import LaterEncoder
from xllm.cli.flags import settings_options
from xllm.cli.model_source import resolve_models
from xllm.cli.targets import run_master
from xllm.config.environment import prepare_environment
from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.protocol import codec


@click.command()
@click.option("--speak", type=int, default=None, help="Version of the protocol that it says.")
@settings_options("cluster", "etcd", "model", "master", "scheduler", "worker", "chaos")
def join(speak: int | None, settings: Settings) -> None:
    """Run a master. With --speak, all that it says has a field more than this version knows."""
    if speak is not None:
        later = typing.cast("msgspec.msgpack.Encoder", LaterEncoder(speak))
        codec._ENCODER = later
    run_master(encode_settings(resolve_models(settings)))


if __name__ == "__main__":
    prepare_environment()
    sys.exit(join.main(standalone_mode=False))
