"""CURVE keys of a node and the allow-list of its peers.

A keys directory holds `node.key` (public), `node.key_secret` (0600) and `allowed/`, one public
key file a peer. A server socket asks the authenticator of its context for every handshake;
ZAP_ENFORCE_DOMAIN makes a dead authenticator refuse everybody instead of admitting them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from xllm.errors import ConfigError

ZAP_DOMAIN = "xllm"
NODE_KEY = "node"


@dataclasses.dataclass(frozen=True)
class Security:
    """A node's key pair (Z85 text) and where its peers' public keys are."""

    public_key: str
    secret_key: str = dataclasses.field(repr=False)
    allowed_dir: str = ""

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
        return Security(public.decode(), secret.decode(), allowed)


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
        public_path, secret_path = zmq.auth.create_certificates(directory, NODE_KEY)
    finally:
        os.umask(previous)
    os.chmod(secret_path, 0o600)
    os.chmod(directory, 0o700)
    (allowed / "self.key").write_bytes(pathlib.Path(public_path).read_bytes())
    public, _ = zmq.auth.load_certificate(public_path)
    return public.decode()


class Authenticator:
    """The ZAP handler of one context: admits the keys of `allowed/`, by its own thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], security: Security) -> None:
        self._thread = ThreadAuthenticator(context)
        self._thread.start()
        self._allowed_dir = security.allowed_dir
        self.reload()

    def reload(self) -> None:
        """Read the allow-list again. A key that left it keeps its open connections until they
        close: revocation also needs those peers cut off."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._thread.configure_curve(domain=ZAP_DOMAIN, location=self._allowed_dir)

    def close(self) -> None:
        """Stop the thread; from now on every handshake is refused."""
        self._thread.stop()


def secure_server(socket: zmq.Socket[bytes], security: Security) -> None:
    """Make a binding socket demand keys."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.secret_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, security.public_key)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[bytes], security: Security, server_key: str) -> None:
    """Make a connecting socket present its key and demand the server's."""
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, server_key)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.secret_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, security.public_key)
