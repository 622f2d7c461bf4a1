"""How far the start of a service is, from what its processes report.

Pure. Knows which processes are expected, not how they are started or shown.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping

from xllm.protocol.launch import (
    LaunchMessage,
    ProcessFailed,
    ProcessProgress,
    ProcessReady,
    ProcessStarted,
    ProcessStopping,
)

_READY_WORDS: Mapping[str, str] = types.MappingProxyType(
    {"router": "listens", "kvcache": "listens", "registry": "listens", "worker": "loaded"}
)


def ready_word(kind: str) -> str:
    """What to show for a process of that kind that has started well. Only an instance is "ready":
    the others serve nobody by themselves, and who reads "ready" goes and asks."""
    return _READY_WORDS.get(kind, "ready")


@dataclasses.dataclass(frozen=True)
class ServiceAddresses:
    """Where clients reach the service; empty while that is not known."""

    http: str = ""
    zmq: str = ""
    more_zmq: tuple[str, ...] = ()
    """Those of further routers."""


class Startup:
    """What each expected process said last."""

    def __init__(self, expected: Iterable[str]) -> None:
        self._expected = frozenset(expected)
        self._ready: set[str] = set()
        self._failures: dict[str, ProcessFailed] = {}
        self._last_failure: ProcessFailed | None = None
        self._addresses: dict[str, ServiceAddresses] = {}
        """Of each router that was ready once."""

    @property
    def addresses(self) -> ServiceAddresses:
        """The first router's, and where the others are reached."""
        first, *others = [self._addresses[name] for name in sorted(self._addresses)] or [
            ServiceAddresses()
        ]
        return dataclasses.replace(first, more_zmq=tuple(one.zmq for one in others if one.zmq))

    def addresses_of(self, name: str) -> ServiceAddresses:
        """Where one router listens, or listened; empty while that is not known."""
        return self._addresses.get(name, ServiceAddresses())

    @property
    def all_ready(self) -> bool:
        """Whether every expected process does its work."""
        return self._expected <= self._ready

    def is_ready(self, name: str) -> bool:
        """Whether this process said so since it was started last."""
        return name in self._ready

    def handle(self, message: LaunchMessage) -> str:
        """Take in a report; returns the line to show for it, or nothing."""
        match message:
            case ProcessStarted(kind, name, pid, detail):
                self._failures.pop(name, None)
                return _line(kind, name, f"started (pid {pid})", detail)
            case ProcessReady(kind, name, pid, addresses, detail):
                self._ready.add(name)
                if kind == "router":
                    self._addresses[name] = _find_addresses(addresses)
                return _line(kind, name, f"{ready_word(kind)} (pid {pid})", detail)
            case ProcessFailed(kind, name, _, text):
                known = self._failures.get(name)
                self._failures[name] = self._last_failure = message
                # A process says so when it fails, and once more as its last word.
                told = known is not None and known.message == text
                return "" if told else _line(kind, name, "failed", text)
            case ProcessStopping(kind, name, num_open):
                return _line(kind, name, "drains", f"{num_open} open") if num_open else ""
            case ProcessProgress():
                return ""

    def ended(self, name: str) -> str:
        """A child ended; returns why, where it (or a child of its own) said so."""
        self._ready.discard(name)
        failure = self._failures.pop(name, None) or self._last_failure
        self._last_failure = None
        return failure.message if failure is not None else ""


def _line(kind: str, name: str, what: str, detail: str) -> str:
    return f"{kind:<8} {name}: {what}" + (f", {detail}" if detail else "")


def _find_addresses(addresses: Iterable[tuple[str, str]]) -> ServiceAddresses:
    http = next((where for _, where in addresses if where.startswith("http")), "")
    zmq = next((where for what, where in addresses if what == "zmq"), "")
    return ServiceAddresses(http, zmq)
