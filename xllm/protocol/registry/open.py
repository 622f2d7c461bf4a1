"""Chooses a registry's implementation by its address; knows nothing else of it."""

from __future__ import annotations

from xllm.config.etcd import EtcdSettings
from xllm.errors import BrokenError, ConfigError
from xllm.protocol.registry.etcd_address import is_etcd, parse_etcd_address
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.remote import RemoteRegistry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import check_tcp_port, split_key

_NEEDS_KEYS = (
    "set cluster.keys_dir, and append ;key=PUBLIC_KEY of the node that serves the registry to "
    "its address"
)


def split_address(address: str) -> tuple[str, str]:
    """(endpoint, public key or "") of an address; ConfigError where it is malformed."""
    if is_etcd(address):
        parse_etcd_address(address)
        return address, ""
    endpoint, server_key = split_key(address, "cluster.registry")
    scheme, separator, rest = endpoint.partition("://")
    if scheme not in ("ipc", "inproc", "tcp") or not separator or not rest:
        raise ConfigError(
            f"cluster.registry {address!r}: ipc://, inproc://, tcp:// or etcd:// is expected",
            param="cluster.registry",
        )
    check_tcp_port(endpoint, "cluster.registry")
    return endpoint, server_key


def open_registry(
    address: str,
    transport: Transport,
    *,
    etcd: EtcdSettings | None = None,
    timeout_s: float = 3.0,
    first_timeout_s: float = 8.0,
) -> Registry:
    """The registry at `ipc://path`, `inproc://name`, `tcp://host:port[;key=PUBLIC_KEY]`,
    `etcd://host:port[,host:port...]` or, with TLS, `etcds://...`.

    The key is the public key of the node that serves the registry; without it a process that has
    keys expects its own node's. `etcd` says which certificates and which user. Returns at once:
    the first call waits for the connection. Raises ConfigError for no or a malformed address, for
    one that demands keys which this process has not, and for files that cannot be used;
    DependencyError where etcd's client cannot be loaded."""
    if is_etcd(address):
        # gRPC and etcd's stubs: only for those who speak to one.
        from xllm.protocol.registry.etcd import EtcdRegistry

        return EtcdRegistry(
            parse_etcd_address(address),
            etcd,
            timeout_s=timeout_s,
            first_timeout_s=first_timeout_s,
        )
    endpoint, server_key = split_address(address)
    if endpoint.startswith("tcp://"):
        server_key = server_key or transport.public_key
    try:
        return RemoteRegistry(
            transport,
            endpoint,
            server_key=server_key,
            timeout_s=timeout_s,
            first_timeout_s=first_timeout_s,
        )
    except BrokenError as error:  # nobody was asked yet: what was configured cannot work
        hint = "" if transport.public_key else f"; {_NEEDS_KEYS}"
        raise ConfigError(
            f"cluster.registry: {error.message}{hint}", param="cluster.registry"
        ) from error
