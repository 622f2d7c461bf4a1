"""What every registry refuses, whichever it is: times, keys and values out of bounds. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xllm.errors import InvalidRequestError
from xllm.protocol.registry.interface import (
    MAX_GUARDED_WRITES,
    MAX_KEY_CHARS,
    MAX_TTL_S,
    MAX_VALUE_BYTES,
)


def check_ttl(ttl_s: float) -> None:
    """InvalidRequestError unless a lease can have this time to live."""
    if not (math.isfinite(ttl_s) and 0 < ttl_s <= MAX_TTL_S):
        raise InvalidRequestError(f"ttl_s must be in (0, {MAX_TTL_S:g}]", param="ttl_s")


def check_write(key: str, value: bytes) -> None:
    """InvalidRequestError unless a key of that name can have this value."""
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise InvalidRequestError(f"a key has 1 to {MAX_KEY_CHARS} characters", param="key")
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidRequestError(
            f"{len(value)} bytes; a value has at most {MAX_VALUE_BYTES}", param="value"
        )


def check_guarded(puts: Sequence[tuple[str, bytes]], deletes: Sequence[str]) -> None:
    """InvalidRequestError unless one guarded write can have these puts and deletes."""
    names = [*(key for key, _ in puts), *deletes]
    if len(names) > MAX_GUARDED_WRITES or len(set(names)) != len(names):
        raise InvalidRequestError(
            f"a guarded write names at most {MAX_GUARDED_WRITES} keys, each once", param="puts"
        )
    for key, value in puts:
        check_write(key, value)
