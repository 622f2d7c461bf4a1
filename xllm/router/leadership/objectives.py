"""Objectives that hold for requests that name none, and can be changed while routers run. Pure.

The registry's key `slo` holds them as a JSON object, {"ttft_ms": 500, "tpot_ms": 50}; every router
watches it. A value that is out of bounds changes nothing.
"""

from __future__ import annotations

import msgspec

from xllm.errors import InvalidRequestError
from xllm.protocol.generation import SubmitRequest
from xllm.router.validation import MAX_OBJECTIVE_MS


class ServiceObjectives(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds to the first token and between later ones; 0: the instance's own setting."""

    ttft_ms: int = 0
    tpot_ms: int = 0


def read_objectives(value: bytes | None) -> ServiceObjectives:
    """The objectives of a registry's value (None: no key); InvalidRequestError naming field and
    bound."""
    if value is None:
        return ServiceObjectives()
    try:
        found = msgspec.json.decode(value, type=ServiceObjectives)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"slo: {error}", param="slo") from error
    check_objectives(found)
    return found


def check_objectives(objectives: ServiceObjectives) -> None:
    """InvalidRequestError naming field and bound."""
    for param, value in (("ttft_ms", objectives.ttft_ms), ("tpot_ms", objectives.tpot_ms)):
        if not 0 <= value <= MAX_OBJECTIVE_MS:
            raise InvalidRequestError(
                f"slo: {param} must be from 0 to {MAX_OBJECTIVE_MS}, not {value}", param=param
            )


def amend_objectives(value: bytes | None, ttft_ms: int | None, tpot_ms: int | None) -> bytes | None:
    """What the registry's value (None: no key) becomes when these are set; None leaves what it has.
    InvalidRequestError naming field and bound, of what is set or of what was to be left."""
    is_whole = ttft_ms is not None and tpot_ms is not None
    now = ServiceObjectives() if is_whole else read_objectives(value)
    amended = ServiceObjectives(
        now.ttft_ms if ttft_ms is None else ttft_ms, now.tpot_ms if tpot_ms is None else tpot_ms
    )
    check_objectives(amended)
    if value is None and amended == ServiceObjectives():
        return None
    return msgspec.json.encode(amended)


def restore_objectives(value: bytes | None, lost: ServiceObjectives) -> bytes | None:
    """The registry's value, or, where it has none (None), the one that it has lost."""
    if value is None and lost != ServiceObjectives():
        return msgspec.json.encode(lost)
    return value


class LiveObjectives:
    """What is in force at one router."""

    def __init__(self) -> None:
        self._now = ServiceObjectives()

    @property
    def now(self) -> ServiceObjectives:
        """In force now."""
        return self._now

    def changed(self, value: bytes | None) -> None:
        """The key was written, or (None) is gone. InvalidRequestError changes nothing."""
        self._now = read_objectives(value)

    def fill(self, request: SubmitRequest) -> SubmitRequest:
        """The request with these objectives where it has none of its own."""
        now = self._now
        if request.embed or not (now.ttft_ms or now.tpot_ms):
            return request
        return msgspec.structs.replace(
            request,
            ttft_ms=request.ttft_ms or now.ttft_ms,
            tpot_ms=request.tpot_ms or now.tpot_ms,
        )
