"""What to do when a child of the launcher ends: start it again, and when, or give up.

Pure: it is told exit codes and the time. A child that cannot be helped by another try (wrong
configuration, a missing thing at its start) is given up at once, as is one that fails again and
again; a fenced one starts again without delay.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from xllm.errors import ConfigError, DependencyError, FencedError, XllmError

EXIT_SYSTEM = 71
MAX_CRASHES = 5
WINDOW_S = 60.0
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


@dataclasses.dataclass(frozen=True)
class Restart:
    """Start it again after `delay_s` seconds."""

    delay_s: float


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Another try would end alike: the launcher stops with `exit_code`."""

    exit_code: int
    reason: str


class RestartPolicy:
    """The crashes of one child."""

    def __init__(self) -> None:
        self._crashes: deque[float] = deque()

    def exited(self, code: int, now: float, *, was_ready: bool) -> Restart | GiveUp:
        """It ended without being asked to. `code`: its exit code, negative for a signal."""
        if code == ConfigError.exit_code:
            return GiveUp(code, "its configuration is wrong")
        if not was_ready and code in (DependencyError.exit_code, EXIT_SYSTEM):
            return GiveUp(code, "it cannot start")
        while self._crashes and now - self._crashes[0] >= WINDOW_S:
            self._crashes.popleft()
        self._crashes.append(now)
        if len(self._crashes) >= MAX_CRASHES:
            exit_code = code if code > 0 else XllmError.exit_code
            return GiveUp(exit_code, f"{len(self._crashes)} ends within {WINDOW_S:g} s")
        if code == FencedError.exit_code:
            return Restart(0.0)
        return Restart(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (len(self._crashes) - 1)))


def describe_exit(code: int) -> str:
    """`signal 9` or `exit code 70`."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
