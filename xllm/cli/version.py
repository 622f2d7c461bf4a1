"""`xllm version`: what a report of a fault should begin with."""

from __future__ import annotations

import importlib.metadata
import platform

import click

import xllm

_PACKAGES = ("torch", "transformers", "pyzmq", "msgspec", "uvloop", "starlette", "tokenizers")


@click.command()
def version() -> None:
    """Show the versions of xLLM, Python and what it builds on."""
    click.echo(f"xllm {xllm.__version__}")
    click.echo(f"python {platform.python_version()} ({platform.machine()})")
    for package in _PACKAGES:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        click.echo(f"{package} {found}")
