"""Which addresses may be listened on without keys: loopback and ipc, nothing else."""

from __future__ import annotations

import ipaddress

from xllm.config.settings import Settings
from xllm.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine alone. Names other than `localhost`
    are not resolved: what a resolver says today it may not say tomorrow."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local_endpoint(endpoint: str) -> bool:
    """Whether a ZeroMQ endpoint is ipc, inproc or tcp on loopback. Empty: ipc by default."""
    if not endpoint or endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    return is_loopback(host)


def check_exposure(settings: Settings) -> None:
    """ConfigError where something would listen beyond loopback without what protects it."""
    router = settings.router
    if not is_loopback(router.host) and not router.api_key_file:
        raise ConfigError(
            f"router.host {router.host} is beyond loopback: --api-key-file is needed",
            param="router.host",
        )
    if settings.cluster.keys_dir:
        return
    if not is_loopback(router.zmq_host):
        raise ConfigError(
            f"router.zmq_host {router.zmq_host} is beyond loopback: --cluster-keys-dir is needed",
            param="router.zmq_host",
        )
    endpoints = {
        "router.bus_endpoint": router.bus_endpoint,
        "master.endpoint": settings.master.endpoint,
        "master.bus_endpoint": settings.master.bus_endpoint,
        "master.worker_endpoint": settings.master.worker_endpoint,
        "kvcache.endpoint": settings.kvcache.endpoint,
        "kvcache.bus_endpoint": settings.kvcache.bus_endpoint,
    }
    for key, endpoint in endpoints.items():
        if not is_local_endpoint(endpoint):
            raise ConfigError(
                f"{key} {endpoint} is beyond loopback: --cluster-keys-dir is needed", param=key
            )
