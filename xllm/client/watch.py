"""Whether the router that a client speaks with is there: decides from what was heard, and when.

Pure: the time is monotonic seconds. A connection alone proves little, since ZeroMQ's own thread
keeps it alive while the router's process stands still or is stopped: only words of the router's
loop count. Nothing is judged while nothing is open.
"""

from __future__ import annotations

import enum

from xllm.client.retries import try_time

PINGS_A_SILENCE = 4
"""Pings sent in a silence before it counts as an absence."""


class Verdict(enum.Enum):
    """What to do about the router."""

    NOTHING = enum.auto()
    PING = enum.auto()
    """Ask it for a word."""
    NEXT = enum.auto()
    """Turn to the next router."""
    GIVE_UP = enum.auto()
    """None of them answers: fail what is open, then turn to the next."""


class RouterWatch:
    """Judges one router at a time, of `num_routers`.

    `silence_s`: how long a router that is connected may say nothing while something is open. With
    one router only its connection counts: there is nobody to turn to."""

    def __init__(self, connect_timeout_s: float, silence_s: float) -> None:
        self.num_routers = 1
        self._connect_timeout_s = connect_timeout_s
        self._silence_s = silence_s
        self._num_tries = 0
        self._patience_s = 0.0
        self._since: float | None = None
        """Since when the present router owes a word; None: it does not."""
        self._absent_since: float | None = None
        """Since when no router has said a word that was owed."""
        self._pinged_at = 0.0

    def opened(self, chance: float) -> None:
        """Another router is tried from now on."""
        self._patience_s = try_time(self._num_tries, self.num_routers, chance)
        self._num_tries += 1
        self._since = None

    def tick(self, now: float, *, connected: bool, heard: bool, waiting: bool) -> Verdict:
        """Often while something is open (`waiting`). `heard`: a word came since the last tick."""
        if heard or not waiting:
            self._num_tries = 0
            self._absent_since = None
            self._since = self._pinged_at = now
            return Verdict.NOTHING
        if self._since is None:
            self._since = self._pinged_at = now
        if self._absent_since is None:
            self._absent_since = now
        silent_s = now - self._since
        absent_s = now - self._absent_since
        if connected:
            return self._judge_silence(now, silent_s, absent_s)
        if absent_s >= self._connect_timeout_s:
            return Verdict.GIVE_UP
        if self.num_routers > 1 and silent_s >= self._patience_s:
            return Verdict.NEXT
        return Verdict.NOTHING

    def rested(self, now: float) -> None:
        """Something is open again, or all that was has failed: what was owed is forgotten."""
        self._absent_since = None
        self._since = self._pinged_at = now

    def _judge_silence(self, now: float, silent_s: float, absent_s: float) -> Verdict:
        if self.num_routers > 1 and silent_s >= self._silence_s:
            is_last = absent_s >= self._connect_timeout_s + self._silence_s
            return Verdict.GIVE_UP if is_last else Verdict.NEXT
        if now - self._pinged_at >= self._silence_s / PINGS_A_SILENCE:
            self._pinged_at = now
            return Verdict.PING
        return Verdict.NOTHING
