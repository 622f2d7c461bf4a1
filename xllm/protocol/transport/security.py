"""CURVE keys of a node, and the authenticator that asks its allow-lists.

A keys directory holds `node.key` (public), `node.key_secret` (0600), `allowed/`, one public key
file a peer of the cluster, and perhaps `clients/`, one a client (see allow_list). A server socket
asks the authenticator of its context for every handshake, naming its domain: sockets of the cluster
admit its peers only, a router's client front admits clients too. ZAP_ENFORCE_DOMAIN makes a dead
authenticator refuse everybody instead of admitting them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from xllm.errors import ConfigError
from xllm.protocol.transport.allow_list import CLIENT_DOMAIN, CLUSTER_DOMAIN, AllowList

NODE_KEY = "node"
_ZAP = "inproc://zeromq.zap.01"
OWN_NAME = "self"
"""Of the node's own key among those that it allows."""


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
        except OSError as error:
            raise ConfigError(
                f"no usable key at {secret_path}: {error.strerror or 'no file of keys'} "
                f"(cluster.keys_dir; `xllm keys make {keys_dir}` makes keys)"
            ) from error
        except ValueError as error:
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

    Raises ConfigError where keys are there already, or where somebody else had a hand in it."""
    directory = pathlib.Path(keys_dir)
    allowed = directory / "allowed"
    previous = os.umask(0o077)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _take_over(directory)
        for suffix in (".key", ".key_secret"):
            if os.path.lexists(directory / (NODE_KEY + suffix)):
                raise ConfigError(f"{keys_dir} holds keys already")
        allowed.mkdir(exist_ok=True)
        _take_over(allowed)
        public = b"-"
        while public.startswith(b"-"):  # people give it to commands, which take that for a flag
            public_path, secret_path = zmq.auth.create_certificates(directory, NODE_KEY)
            public, _ = zmq.auth.load_certificate(public_path)
    finally:
        os.umask(previous)
    os.chmod(secret_path, 0o600)
    (allowed / f"{OWN_NAME}.key").write_bytes(pathlib.Path(public_path).read_bytes())
    return public.decode()


def _take_over(directory: pathlib.Path) -> None:
    """From now on only this user may write there. ConfigError: it is not his, or a link, and keys
    that are written to it may go anywhere."""
    try:
        info = os.lstat(directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise ConfigError(f"{directory} is no directory of this user")
        os.chmod(directory, 0o700)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error


class Authenticator:
    """The ZAP handler of one context, by its own thread: admits whom the allow-lists name."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList) -> None:
        self._context = context
        self._allowed = allowed
        self._thread = self._start()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether that public key (Z85) is admitted. Called on the authenticator's thread."""
        return self._allowed.peer(key.decode("ascii", "replace"), domain) is not None

    def revive(self) -> bool:
        """Start the thread again if it died, which closes the sockets to everybody new; whether it
        had."""
        if self._thread.is_alive():
            return False
        self._thread.zap_socket.unbind(_ZAP)  # its close would free the name only later
        self._end()
        self._thread = self._start()
        return True

    def close(self) -> None:
        """Stop the thread; from now on every handshake is refused."""
        self._end()

    def _start(self) -> ThreadAuthenticator:
        thread = ThreadAuthenticator(self._context)
        for domain in (CLUSTER_DOMAIN, CLIENT_DOMAIN):
            thread.configure_curve_callback(domain, self)
        thread.start()
        return thread

    def _end(self) -> None:
        if not self._thread.is_alive() and self._thread.pipe is not None:
            # Nobody reads the pipe any more: a word for the thread would wait for ever.
            self._thread.pipe.close(0)
            self._thread.pipe = None  # type: ignore[assignment]  # as its own `stop` leaves it
        self._thread.stop()


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
