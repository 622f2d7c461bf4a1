"""Chooses a registry's implementation by its address; knows nothing else of it."""

from __future__ import annotations

from xllm.errors import ConfigError, DependencyError
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import split_key


def split_address(address: str) -> tuple[str, str]:
    """(endpoint, public key or "") of an address; ConfigError where it is malformed."""
    endpoint, server_key = split_key(address, "cluster.registry")
    scheme, separator, rest = endpoint.partition("://")
    if scheme not in ("ipc", "inproc", "tcp", "etcd") or not separator or not rest:
        raise ConfigError(
            f"registry address {address!r}: ipc://, inproc:// or tcp:// is expected",
            param="cluster.registry",
        )
    return endpoint, server_key


def open_registry(
    address: str,
    transport: Transport,
    *,
    timeout_s: float = 3.0,
    first_timeout_s: float = 8.0,
) -> Registry:
    """The registry at `ipc://path`, `inproc://name` or `tcp://host:port[;key=PUBLIC_KEY]`.

    The key is the public key of the node that serves the registry; without it a process that has
    keys expects its own node's. Returns at once: the first call waits for the connection. Raises
    ConfigError for no or a malformed address, DependencyError for etcd, which is not spoken yet."""
    endpoint, server_key = split_address(address)
    if endpoint.startswith("etcd://"):
        raise DependencyError(
            f"{address}: etcd is not supported yet; use the embedded registry (xllm registry)",
            param="cluster.registry",
        )
    if endpoint.startswith("tcp://") and not server_key and transport.security is not None:
        server_key = transport.security.public_key
    return RemoteRegistry(
        transport,
        endpoint,
        server_key=server_key,
        timeout_s=timeout_s,
        first_timeout_s=first_timeout_s,
    )
