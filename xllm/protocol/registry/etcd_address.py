"""Where etcd is, from `etcd://host:port[,host:port...]` or `etcds://` for TLS. Pure."""

from __future__ import annotations

import dataclasses
import re

from xllm.errors import ConfigError

SCHEMES = ("etcd", "etcds")
_ENDPOINT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


@dataclasses.dataclass(frozen=True)
class EtcdAddress:
    """The members of one etcd cluster, as host:port, in the order in which they are tried."""

    endpoints: tuple[str, ...]
    tls: bool

    def __str__(self) -> str:
        return f"{'etcds' if self.tls else 'etcd'}://{','.join(self.endpoints)}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts alone."""
        return tuple(endpoint.rpartition(":")[0] for endpoint in self.endpoints)


def is_etcd(address: str) -> bool:
    """Whether an address is one of etcd's."""
    return address.partition("://")[0] in SCHEMES


def parse_etcd_address(address: str) -> EtcdAddress:
    """The address; ConfigError names what is malformed in it."""
    scheme, _, rest = address.partition("://")
    endpoints = tuple(part.strip() for part in rest.split(","))
    for endpoint in endpoints:
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None or not 0 < int(match[2]) < 65536:
            raise ConfigError(
                f"cluster.registry {address!r}: {endpoint!r} is not host:port; "
                f"{scheme}://host:port[,host:port...] is expected",
                param="cluster.registry",
            )
    return EtcdAddress(endpoints, scheme == "etcds")
