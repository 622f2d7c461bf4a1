"""When a worker that ended is started again, and when the master gives up.

Pure: it is told ends and the time. A worker that had been ready, and did not end within the last
CALM_S, is started again at once; others back off from 0.5 s to 30 s. Five ends within a minute, or
one that another try cannot help (a wrong setting, a missing thing before the first start), and it
gives up. An end that a request is known to be the reason of says nothing of the worker.
"""

from __future__ import annotations

from collections import deque

from xllm.errors import ConfigError, DependencyError, XllmError

MAX_CRASHES = 5
WINDOW_S = 60.0
FIRST_DELAY_S = 0.5
CALM_S = 10.0
MAX_DELAY_S = 30.0
_HOPELESS = (ConfigError.exit_code, DependencyError.exit_code)


class WorkerRestarts:
    """The ends of one worker."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque()
        self.exit_code = XllmError.exit_code
        """What the master exits with after giving up."""

    def ended(
        self, code: int, now: float, *, was_ready: bool, is_excused: bool = False
    ) -> float | None:
        """A worker ended unasked, with this exit code (negative: a signal). Seconds until it is
        started again; None: give up."""
        if is_excused:
            return 0.0
        while self._ends and now - self._ends[0] >= WINDOW_S:
            self._ends.popleft()
        self._ends.append(now)
        if not was_ready and code in _HOPELESS:
            self.exit_code = code
            return None
        if len(self._ends) >= MAX_CRASHES:
            return None
        if was_ready and (len(self._ends) == 1 or now - self._ends[-2] >= CALM_S):
            return 0.0
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (len(self._ends) - 1 - was_ready))
