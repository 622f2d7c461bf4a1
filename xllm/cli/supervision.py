"""What to do when a child of the launcher ends: start it again, and when, or give up.

Pure: it is told exit codes and the time. Until the service has been ready, a child that another
try cannot help (wrong configuration, a missing thing at its start) ends the start at once, as
does one that fails again and again. Later only a child without which nobody is served does: any
other one is tried again now and then, for as long as it takes. A fenced one starts again without
delay.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from xllm.errors import ConfigError, DependencyError, FencedError, XllmError

EXIT_SYSTEM = 71
MAX_CRASHES = 5
WINDOW_S = 60.0
FIRST_DELAY_S = 0.5
CALM_S = 10.0
MAX_DELAY_S = 30.0
QUARANTINE_S = 30.0


@dataclasses.dataclass(frozen=True)
class Restart:
    """Start it again after `delay_s` seconds."""

    delay_s: float


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Another try would end alike: the launcher stops with `exit_code`."""

    exit_code: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Quarantine:
    """The service goes on without it; start it again after `delay_s` seconds."""

    delay_s: float
    reason: str = ""
    """Why; empty where it was there already."""


Decision = Restart | Quarantine | GiveUp


class RestartPolicy:
    """The crashes of one child."""

    def __init__(self) -> None:
        self._crashes: deque[float] = deque()
        self.quarantined = False
        """Whether its last end put it there."""

    def exited(self, code: int, now: float, *, was_ready: bool, needed: bool) -> Decision:
        """It ended without being asked to. `code`: its exit code, negative for a signal;
        `was_ready`: whether it, or one like it in its place, once started well; `needed`: whether
        the service is of no use, or was never ready, without it."""
        while self._crashes and now - self._crashes[0] >= WINDOW_S:
            self._crashes.popleft()
        self._crashes.append(now)
        if self.quarantined and len(self._crashes) > 1 and not needed:
            return Quarantine(QUARANTINE_S)
        self.quarantined = False
        reason = self._why_hopeless(code, was_ready)
        if reason and not needed:
            self.quarantined = True
            return Quarantine(QUARANTINE_S, reason)
        if reason:
            return GiveUp(code if code > 0 else XllmError.exit_code, reason)
        if code == FencedError.exit_code:
            return Restart(0.0)
        if was_ready and (len(self._crashes) == 1 or now - self._crashes[-2] >= CALM_S):
            return Restart(0.0)
        num_waits = len(self._crashes) - was_ready
        return Restart(min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (num_waits - 1)))

    def _why_hopeless(self, code: int, was_ready: bool) -> str:
        if code == ConfigError.exit_code:
            return "its configuration is wrong"
        if not was_ready and code in (DependencyError.exit_code, EXIT_SYSTEM):
            return "it cannot start"
        if len(self._crashes) >= MAX_CRASHES:
            return f"{len(self._crashes)} ends within {WINDOW_S:g} s"
        return ""


def describe_exit(code: int) -> str:
    """`signal 9` or `exit code 70`."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
