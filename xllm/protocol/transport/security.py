"""CURVE keys of a node and the allow-lists of its peers.

A keys directory holds `node.key` (public), `node.key_secret` (0600), `allowed/`, one public key
file a peer of the cluster, and perhaps `clients/`, one a client. A server socket asks the
authenticator of its context for every handshake, naming its domain: sockets of the cluster admit
its peers only, a router's client front admits clients too. ZAP_ENFORCE_DOMAIN makes a dead
authenticator refuse everybody instead of admitting them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from xllm.errors import ConfigError

CLUSTER_DOMAIN = "xllm"
"""Sockets between processes of the cluster."""
CLIENT_DOMAIN = "xllm-clients"
"""The sockets that clients reach."""
NODE_KEY = "node"


@dataclasses.dataclass(frozen=True)
class Security:
    """A node's key pair (Z85 text) and where its peers' and clients' public keys are.
    `clients_dir` need not exist: then only peers of the cluster are clients."""

    public_key: str
    secret_key: str = dataclasses.field(repr=False)
    allowed_dir: str = ""
    clients_dir: str = ""

    @staticmethod
    def load(keys_dir: str) -> Security:
        """Read a keys directory. Raises ConfigError where it is incomplete or too open."""
        secret_path = os.path.join(keys_dir, NODE_KEY + ".key_secret")
        try:
            mode = os.stat(secret_path).st_mode
            if mode & 0o077:
                raise ConfigError(f"{secret_path} is readable by others: its mode must be 0600")
            public, secret = zmq.auth.load_certificate(secret_path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no usable key at {secret_path}: {error}") from error
        if secret is None:
            raise ConfigError(f"{secret_path} holds no secret key")
        allowed = os.path.join(keys_dir, "allowed")
        if not os.path.isdir(allowed):
            raise ConfigError(f"{allowed} is missing: the public keys of allowed peers go there")
        clients = os.path.join(keys_dir, "clients")
        return Security(public.decode(), secret.decode(), allowed, clients)


def create_keys(keys_dir: str) -> str:
    """Make a node's key pair (0600) with itself on the allow-list; returns the public key.

    Raises ConfigError where keys are there already."""
    directory = pathlib.Path(keys_dir)
    if (directory / (NODE_KEY + ".key_secret")).exists():
        raise ConfigError(f"{keys_dir} holds keys already")
    allowed = directory / "allowed"
    previous = os.umask(0o077)
    try:
        allowed.mkdir(parents=True, exist_ok=True)
        public = b"-"
        while public.startswith(b"-"):  # people give it to commands, which take that for a flag
            public_path, secret_path = zmq.auth.create_certificates(directory, NODE_KEY)
            public, _ = zmq.auth.load_certificate(public_path)
    finally:
        os.umask(previous)
    os.chmod(secret_path, 0o600)
    os.chmod(directory, 0o700)
    (allowed / "self.key").write_bytes(pathlib.Path(public_path).read_bytes())
    return public.decode()


class AllowList:
    """The keys that one domain admits, as pyzmq asks for them."""

    def __init__(self) -> None:
        self.keys: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether that public key (Z85) is admitted. Called on the authenticator's thread."""
        return key in self.keys


class Authenticator:
    """The ZAP handler of one context: admits the keys of `allowed/` everywhere and those of
    `clients/` where clients are served, by its own thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], security: Security) -> None:
        self._security = security
        self._peers = AllowList()
        self._clients = AllowList()
        self.reload()
        self._thread = ThreadAuthenticator(context)
        self._thread.configure_curve_callback(CLUSTER_DOMAIN, self._peers)
        self._thread.configure_curve_callback(CLIENT_DOMAIN, self._clients)
        self._thread.start()

    def reload(self) -> None:
        """Read the allow-lists again; ConfigError leaves them as they were. A key that left them
        keeps its open connections until they close: revocation also needs those peers cut off."""
        peers = _public_keys(self._security.allowed_dir)
        clients = _public_keys(self._security.clients_dir)
        self._peers.keys = peers
        self._clients.keys = peers | clients

    def close(self) -> None:
        """Stop the thread; from now on every handshake is refused."""
        self._thread.stop()


def _public_keys(directory: str) -> frozenset[bytes]:
    """The keys of a directory's `*.key` files; none where it does not exist. ConfigError for a
    file that holds no key."""
    if not os.path.isdir(directory):
        return frozenset()
    found = set()
    for path in sorted(pathlib.Path(directory).glob("*.key")):
        try:
            public, _ = zmq.auth.load_certificate(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no public key in {path}: {error}") from error
        found.add(public)
    return frozenset(found)


def secure_server(socket: zmq.Socket[bytes], security: Security, domain: str) -> None:
    """Make a binding socket demand keys of those lists."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.secret_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, security.public_key)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[bytes], security: Security, server_key: str) -> None:
    """Make a connecting socket present its key and demand the server's."""
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, server_key)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.secret_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, security.public_key)


def plain_client(socket: zmq.Socket[bytes]) -> None:
    """Make the next connection of a socket one without keys, whatever the last one had."""
    socket.setsockopt(zmq.CURVE_SERVER, 0)
