"""`xllm keys`: a node's CURVE key pair and its lists of allowed peers and clients.

What is secret is 0600 and never printed. A node's processes admit exactly the public keys in
`allowed/`; the port that a router has for clients admits those in `clients/` too. Running processes
look at the lists twice a second: who is taken off is cut.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import click

from xllm.errors import ConfigError
from xllm.protocol.authority import CLIENT_ROLES, EVERY_ROLE, KnownPeer, PeerRole, Roles
from xllm.protocol.transport.allow_list import SUFFIX, read_peer
from xllm.protocol.transport.endpoint import check_public_key
from xllm.protocol.transport.security import OWN_NAME, Security, create_keys

_PEER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_AT_CLIENT_PORT = frozenset((PeerRole.CLIENT, PeerRole.ADMIN))
"""Roles of those who reach the routers' client port only."""


@click.group()
def keys() -> None:
    """Make and exchange the keys of nodes."""


@keys.command()
@click.argument("directory")
def make(directory: str) -> None:
    """Make a key pair in DIRECTORY and print the public key."""
    click.echo(create_keys(directory))


@keys.command()
@click.argument("directory")
def show(directory: str) -> None:
    """Print the public key of DIRECTORY."""
    click.echo(Security.load(directory).public_key)


@keys.command(name="list", short_help="Print whom the node of DIRECTORY admits.")
@click.argument("directory")
def list_(directory: str) -> None:
    """Print whom the node of DIRECTORY admits: name, list, roles, public key."""
    peers, refused = _read_lists(Security.load(directory))
    for path, peer in peers:
        roles = "any" if peer.roles == EVERY_ROLE else ",".join(sorted(peer.roles))
        click.echo(f"{peer.name}\t{path.parent.name}\t{roles}\t{peer.public_key}")
    if refused:
        raise ConfigError("; ".join(refused.values()))


@keys.command(short_help="Admit a peer to the node of DIRECTORY.")
@click.argument("directory")
@click.argument("name")
@click.argument("public_key")
@click.option("--client", is_flag=True, help="The same as --role client.")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([str(role) for role in PeerRole]),
    help="What it may act as; may be repeated. Without any: a node, which has every role.",
)
def allow(directory: str, name: str, public_key: str, client: bool, roles: tuple[str, ...]) -> None:
    """Admit the peer NAME, which has PUBLIC_KEY, to the node of DIRECTORY."""
    allow_peer(directory, name, public_key, client=client, roles=roles)
    click.echo(f"{name} is allowed; running processes admit it within a second")


@keys.command(short_help="Take a peer off the lists of DIRECTORY.")
@click.argument("directory")
@click.argument("name")
def revoke(directory: str, name: str) -> None:
    """Take the peer NAME off the lists of DIRECTORY, with every other name of its key."""
    names = revoke_peer(directory, name)
    click.echo(f"{', '.join(names)}: revoked; running processes cut it within a second")


def allow_peer(
    directory: str,
    name: str,
    public_key: str,
    *,
    client: bool = False,
    roles: Sequence[str] = (),
) -> Path:
    """Write a peer's (or a client's) public key to its allow-list; returns the file. ConfigError
    for a name, key or role that is none. Peers with no role but client and admin are put on the
    clients' list."""
    if not _PEER_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a peer: letters, digits, '.', '_', '-'")
    check_public_key(public_key, "PUBLIC_KEY")
    given = {*map(PeerRole, roles), *(CLIENT_ROLES if client else ())}
    security = Security.load(directory)
    at_clients = bool(given) and given <= _AT_CLIENT_PORT
    folder = Path(security.clients_dir if at_clients else security.allowed_dir)
    folder.mkdir(mode=0o700, exist_ok=True)
    said = f'    roles = "{",".join(sorted(given))}"\n' if given - CLIENT_ROLES else ""
    text = f'metadata\n    name = "{name}"\n{said}curve\n    public-key = "{public_key}"\n'
    path = folder / f"{name}{SUFFIX}"
    # Whole or not at all: processes that run read it.
    fresh = folder / f".{name}.{secrets.token_hex(8)}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(fresh, path)
    return path


def revoke_peer(directory: str, name: str) -> list[str]:
    """Remove the files of a peer's key from both lists; returns their names. Files that say no key
    admit nobody, and go only where they have that name. ConfigError where there is no such peer,
    or it is the node itself."""
    security = Security.load(directory)
    peers, refused = _read_lists(security)
    revoked = {peer.public_key for path, peer in peers if path.name == name + SUFFIX}
    broken = [path for path in refused if path.name == name + SUFFIX]
    if not revoked and not broken:
        raise ConfigError(f"{directory} admits nobody of the name {name!r}")
    if name == OWN_NAME or security.public_key in revoked:
        raise ConfigError(f"{name} is this node's own key: make a new pair instead")
    paths = [*(path for path, peer in peers if peer.public_key in revoked), *broken]
    for path in paths:
        path.unlink()
    return sorted(path.name.removesuffix(SUFFIX) for path in paths)


def _read_lists(security: Security) -> tuple[list[tuple[Path, KnownPeer]], dict[Path, str]]:
    """Who is on both lists, by file, and of files that admit nobody what is wrong with them."""
    peers: list[tuple[Path, KnownPeer]] = []
    refused: dict[Path, str] = {}
    lists: tuple[tuple[str, Roles], ...] = (
        (security.allowed_dir, EVERY_ROLE),
        (security.clients_dir, CLIENT_ROLES),
    )
    for folder, default in lists:
        for path in sorted(Path(folder).glob("*" + SUFFIX)):
            try:
                peers.append((path, read_peer(str(path), default)))
            except FileNotFoundError:
                continue  # a link that leads nowhere
            except ConfigError as error:
                refused[path] = error.message
    return peers, refused
