"""`xllm keys`: a node's CURVE key pair and its list of allowed peers.

What is secret is 0600 and never printed. A node's processes admit exactly the public keys in
`allowed/`; the port that a router has for clients admits those in `clients/` too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from xllm.errors import ConfigError
from xllm.protocol.transport.security import Security, create_keys

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_PEER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@click.group()
def keys() -> None:
    """Make and exchange the keys of nodes."""


@keys.command()
@click.argument("directory")
def create(directory: str) -> None:
    """Make a key pair in DIRECTORY and print the public key."""
    click.echo(create_keys(directory))


@keys.command()
@click.argument("directory")
def show(directory: str) -> None:
    """Print the public key of DIRECTORY."""
    click.echo(Security.load(directory).public_key)


@keys.command()
@click.argument("directory")
@click.argument("name")
@click.argument("public_key")
@click.option("--client", is_flag=True, help="Admit it to the routers' client port only.")
def allow(directory: str, name: str, public_key: str, client: bool) -> None:
    """Admit the peer NAME, which has PUBLIC_KEY, to the node of DIRECTORY."""
    allow_peer(directory, name, public_key, client=client)
    click.echo(f"{name} is allowed; running processes read the list at their next start")


def allow_peer(directory: str, name: str, public_key: str, *, client: bool = False) -> Path:
    """Write a peer's (or a client's) public key to its allow-list; returns the file. ConfigError
    for a name or key that is none."""
    if not _PEER_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a peer: letters, digits, '.', '_', '-'")
    if not _Z85.fullmatch(public_key):
        raise ConfigError("a public key is 40 characters of Z85")
    security = Security.load(directory)
    folder = Path(security.clients_dir if client else security.allowed_dir)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}.key"
    text = f'metadata\n    name = "{name}"\ncurve\n    public-key = "{public_key}"\n'
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)
    return path
