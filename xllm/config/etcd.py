"""How to reach an etcd that asks who calls: what `cluster.registry` does not say."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class EtcdSettings:
    """Files for TLS (etcds://) and authentication; read again at each new connection."""

    ca_file: str = setting(
        "", "PEM file with the authorities that may have signed etcd's certificate."
    )
    cert_file: str = setting("", "PEM file with the client certificate for etcd; needs key_file.")
    key_file: str = setting("", "PEM file with the client's key for etcd, mode 0600.")
    user_file: str = setting("", "File with one line user:password for etcd, mode 0600.")
