"""The public keys that a node admits, as the files of its keys directory say them.

`allowed/` holds peers of the cluster, `clients/` those who reach the routers' client port only. A
file may say its key's roles; see authority for what stands for none. Lists are read again while
they are in use: a file that says no key then admits nobody, and leaves the others as they are.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterable, Mapping

import structlog

from xllm.errors import ConfigError
from xllm.protocol.authority import CLIENT_ROLES, EVERY_ROLE, KnownPeer, PeerRole, Roles

_log = structlog.get_logger("keys")
CLUSTER_DOMAIN = "xllm"
"""Sockets between processes of the cluster."""
CLIENT_DOMAIN = "xllm-clients"
"""The sockets that clients reach."""
SUFFIX = ".key"
MAX_FILE_BYTES = 64 << 10
_PUBLIC_KEY = re.compile(r'^\s*public-key\s*=\s*"([^"\s]{40})"\s*$', re.MULTILINE)
_ROLES = re.compile(r'^\s*roles\s*=\s*"([^"]*)"\s*$', re.MULTILINE)

FileMark = tuple[str, int, int, int]


def parse_roles(text: str, default: Roles) -> Roles:
    """The roles of a list with commas; `default` for an empty one, ConfigError for unknown ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        return frozenset(map(PeerRole, names)) or default
    except ValueError:
        known = ", ".join(PeerRole)
        raise ConfigError(f"roles {text!r}: they are {known}") from None


def read_peer(path: str, default: Roles) -> KnownPeer:
    """The peer of one file. ConfigError where it holds no key, FileNotFoundError where it went."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"no public key in {path}: {error}") from error
    found = _PUBLIC_KEY.search(text)
    if found is None:
        raise ConfigError(f"no public key in {path}")
    said = _ROLES.search(text)
    name = os.path.basename(path).removesuffix(SUFFIX)
    return KnownPeer(name, found[1], parse_roles(said[1] if said else "", default))


class KeyFolder:
    """One directory of `*.key` files. `default`: the roles of a file that says none."""

    def __init__(self, path: str, default: Roles) -> None:
        self._path = path
        self._default = default
        self._marks: frozenset[FileMark] = frozenset()
        self._is_open = False
        self.peers: Mapping[str, KnownPeer] = {}
        """By public key."""

    def read(self) -> None:
        """Read all files, at a start: ConfigError for a directory that others may write to and for
        a file that says no key."""
        self._marks = self._scan()
        if self._may_be_written():
            raise ConfigError(f"{self._path} may be written by others")
        self.peers = _merged(read_peer(path, self._default) for path in self._files())

    def refresh(self) -> bool:
        """Read them again if any changed; whether any had. While others may write to the
        directory, nobody is admitted who was not before, and none as more than he was."""
        marks, is_open = self._scan(), self._may_be_written()
        if marks == self._marks and is_open == self._is_open:
            return False
        self._marks, self._is_open = marks, is_open
        found = []
        for path in self._files():
            try:
                found.append(read_peer(path, self._default))
            except FileNotFoundError:
                continue  # it went meanwhile, and the next look will see that
            except ConfigError as error:
                _log.error("key_file_refused", error=error.message)
        if is_open:
            _log.error("key_folder_open", error=f"{self._path} may be written by others")
            found = [peer for peer in found if self._is_known(peer)]
        self.peers = _merged(found)
        return True

    def _is_known(self, peer: KnownPeer) -> bool:
        known = self.peers.get(peer.public_key)
        return known is not None and peer.roles <= known.roles

    def _may_be_written(self) -> bool:
        try:
            mode = os.stat(self._path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        return bool(mode & (stat.S_IWGRP | stat.S_IWOTH))

    def _files(self) -> list[str]:
        return [os.path.join(self._path, mark[0]) for mark in sorted(self._marks)]

    def _scan(self) -> frozenset[FileMark]:
        """Names, times, sizes and inodes: what changes with a file's content."""
        marks = []
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    if not entry.name.endswith(SUFFIX):
                        continue
                    try:
                        info = entry.stat()
                    except OSError:
                        continue  # gone, or a link that leads nowhere: no key
                    marks.append((entry.name, info.st_mtime_ns, info.st_size, info.st_ino))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        return frozenset(marks)


def _merged(peers: Iterable[KnownPeer]) -> Mapping[str, KnownPeer]:
    """By public key; a key in several files has the roles of all and the name of the first."""
    found: dict[str, KnownPeer] = {}
    for peer in peers:
        known = found.setdefault(peer.public_key, peer)
        if known is not peer:
            found[peer.public_key] = dataclasses.replace(known, roles=known.roles | peer.roles)
    return found


class AllowList:
    """Everybody whom a node admits: peers of the cluster everywhere, clients at the client port."""

    def __init__(self, allowed_dir: str, clients_dir: str) -> None:
        self._cluster = KeyFolder(allowed_dir, EVERY_ROLE)
        self._clients = KeyFolder(clients_dir, CLIENT_ROLES)
        self._cluster.read()
        self._clients.read()
        self._everybody = self._join()
        self._gone: set[str] = set()

    def peer(self, public_key: str, domain: str) -> KnownPeer | None:
        """Whose key that is at sockets of a domain; None: it is not admitted there."""
        if domain == CLIENT_DOMAIN:
            return self._everybody.get(public_key)
        return self._cluster.peers.get(public_key) if domain == CLUSTER_DOMAIN else None

    def was_revoked(self, public_key: str) -> bool:
        """Whether that key stood in the lists since the start, and stands there no more."""
        return public_key in self._gone

    def refresh(self) -> bool:
        """Read again what changed; whether anything did."""
        changed = [self._cluster.refresh(), self._clients.refresh()]
        if not any(changed):
            return False
        before = self._everybody
        self._everybody = self._join()
        self._gone |= before.keys() - self._everybody.keys()
        self._gone -= self._everybody.keys()
        return True

    def _join(self) -> Mapping[str, KnownPeer]:
        return _merged((*self._cluster.peers.values(), *self._clients.peers.values()))
