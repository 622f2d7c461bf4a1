"""`xllm devices`: what this machine has for an engine to run on, and what is missing."""

from __future__ import annotations

import click


@click.command()
def devices() -> None:
    """Show the devices of this machine: found, or what is missing. `auto` takes the first
    accelerator that is found, else the CPU."""
    # Imports torch: seconds that no other command shall wait.
    from xllm.worker.platform.listing import list_devices

    for device in list_devices():
        mark = "found" if device.is_there else "none "
        click.echo(f"{device.kind:<5} {mark}  {device.text}")
