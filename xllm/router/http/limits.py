"""What one HTTP connection may cost: bytes, counts and patience.

Knows nothing of requests' meaning. Each bound holds before the thing it bounds is allocated.
"""

from __future__ import annotations

import dataclasses
import resource

from xllm.config.router import RouterSettings

SPARE_DESCRIPTORS = 128
"""File descriptors that connections never use: sockets of the bus, logs, models."""


@dataclasses.dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of the HTTP server that are not settings; tests shorten the times."""

    max_body_bytes: int
    max_connections: int
    max_head_bytes: int = 64 << 10
    """Header names and values of one request, together."""
    max_headers: int = 100
    max_url_bytes: int = 8 << 10
    head_s: float = 10.0
    """From a request's first byte (or the connection's begin) to the end of its head."""
    body_s: float = 10.0
    """From the end of the head to the end of the body, plus a second for each 64 KiB."""
    blocked_s: float = 30.0
    """A client that takes nothing for this long loses its connection and its requests."""
    keep_alive_s: float = 75.0
    sweep_s: float = 1.0
    """How often connections are checked against these times."""
    max_pending_bytes: int = 1 << 20
    """Text of one stream that waits for a slow reader."""


BODY_BYTES_PER_S = 64 << 10
"""The rate at which a body must arrive at least, after its first `body_s` seconds."""


def limits_of(settings: RouterSettings) -> HttpLimits:
    """The limits that follow from the settings and from what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    cap = settings.max_inflight + 1024
    if soft != resource.RLIM_INFINITY:
        cap = max(1, min(cap, soft - SPARE_DESCRIPTORS))
    return HttpLimits(max_body_bytes=settings.max_body_bytes, max_connections=cap)
