"""The launcher of a chaos cluster: `xllm serve` whose instances are told to say other addresses
than their own, where a fault proxy stands before them. Run as a module, by `cluster` only.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping

import click

from xllm.cli.flags import settings_options
from xllm.cli.launch_plan import PlannedChild, plan_children, with_settings
from xllm.cli.model_source import resolve_models
from xllm.cli.serve import SECTIONS, run_launcher
from xllm.config.environment import prepare_environment
from xllm.config.settings import Settings

Advertised = Mapping[str, tuple[str, str]]
"""By name of an instance: what routers connect to, for requests and for heartbeats."""


def plan_proxied(
    advertised: Advertised, registries: Mapping[str, str], settings: Settings, run_dir: str
) -> list[PlannedChild]:
    """The processes of a service, with these addresses for its instances, and for each process the
    address at which it finds the registry."""
    planned = []
    for child in plan_children(settings, run_dir):
        if child.settings is not None and child.name in registries:
            cluster = dataclasses.replace(child.settings.cluster, registry=registries[child.name])
            child = with_settings(child, dataclasses.replace(child.settings, cluster=cluster))
        known = advertised.get(child.name)
        if known is not None and child.settings is not None:
            master = dataclasses.replace(
                child.settings.master,
                advertised_endpoint=known[0],
                advertised_bus_endpoint=known[1],
            )
            child = with_settings(child, dataclasses.replace(child.settings, master=master))
        planned.append(child)
    return planned


@click.command()
@click.option("--advertise", multiple=True, metavar="NAME,ENDPOINT,BUS")
@click.option("--registry-of", multiple=True, metavar="NAME,ADDRESS")
@settings_options(*SECTIONS, "chaos")
def launch(advertise: tuple[str, ...], registry_of: tuple[str, ...], settings: Settings) -> int:
    """Serve like `xllm serve`."""
    advertised = {name: (endpoint, bus) for name, endpoint, bus in map(_parts, advertise)}
    registries = dict(text.split(",") for text in registry_of)
    plan = functools.partial(plan_proxied, advertised, registries)
    return run_launcher(resolve_models(settings), plan)


def _parts(text: str) -> tuple[str, str, str]:
    name, endpoint, bus = text.split(",")
    return name, endpoint, bus


if __name__ == "__main__":
    prepare_environment()
    sys.exit(launch.main(standalone_mode=False))
