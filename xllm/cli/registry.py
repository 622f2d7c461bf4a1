"""`xllm registry`: the embedded registry in a process of its own, for nodes without etcd."""

from __future__ import annotations

import click

from xllm.cli.flags import settings_options
from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.errors import ConfigError


@click.command()
@settings_options("cluster")
def registry(settings: Settings) -> None:
    """Serve the registry of a cluster at --registry (ipc://PATH or tcp://HOST:PORT)."""
    if not settings.cluster.registry:
        raise ConfigError("--registry says where to serve", param="cluster.registry")
    from xllm.protocol.registry.process import main

    main(encode_settings(settings))
