"""How long a process that starts waits for the registry: it may be starting too, or again.

Knows nothing of what is asked of it. A registry that is lost later is no matter of this (see
keeper): the process serves on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from xllm.config.cluster import ClusterSettings
from xllm.errors import (
    ClosedError,
    ConfigError,
    DependencyError,
    FencedError,
    OverloadedError,
    PermissionDeniedError,
    TransportError,
)

_log = structlog.get_logger("registration")
_AGAIN_S = 0.5
SAY_S = 10.0
"""How often it is said that the waiting goes on."""

T = TypeVar("T")


async def wait_registry(cluster: ClusterSettings, call: Callable[[], Awaitable[T]]) -> T:
    """What `call` gives, tried again until the registry answers it. The log has a line when the
    waiting begins, one every SAY_S, and one when it ends. DependencyError after
    `cluster.registry_wait_s`; ConfigError where it refuses us."""
    limit_s = cluster.registry_wait_s
    began = time.monotonic()
    said_at: float | None = None
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    found = await call()
                    break
                except ClosedError:
                    raise
                except PermissionDeniedError as error:
                    raise ConfigError(error.message, param=error.param) from error
                except (TransportError, FencedError, OverloadedError) as error:
                    now = time.monotonic()
                    if said_at is None or now - said_at >= SAY_S:
                        said_at = now
                        _log.warning("registry_awaited", limit_s=limit_s, error=error.message)
                await asyncio.sleep(_AGAIN_S)
    except TimeoutError as error:
        address = cluster.registry.partition(";")[0]
        raise DependencyError(
            f"the registry at {address} did not answer in {limit_s:g} s", param="cluster.registry"
        ) from error
    if said_at is not None:
        _log.info("registry_answers", waited_s=round(time.monotonic() - began, 1))
    return found
