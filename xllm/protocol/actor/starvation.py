"""How long a process wanted a CPU and got none: what a watcher must not take for hanging. And
whether a process that says nothing is awake.

The kernel counts, for each thread, its time on a CPU, its time in a run queue and how often it
was given one (/proc/PID/task/TID/schedstat, see proc(5) and sched-stats of the kernel's
documentation), and for each CPU what the hypervisor took of it. Invariant: of an interval at
most the interval is denied; a thread that sleeps, is stopped or waits for a disk is denied none.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

LOCK_TURNS = 50.0
"""Turns a second that only a thread takes which waits for a lock with a short limit, as Python's
threads do for the interpreter: 200 a second, fewer where CPUs are taken."""
LOCK_TURN_S = 0.0002
LOCK_SLEEP_S = 0.0025
"""Such a turn is shorter than the first, on average, and the thread sleeps longer than the second
before the next: it looks at the lock for 20 to 40 microseconds each 5 ms. One that computes keeps
its CPU for longer or, if it is soon driven off, waits for it again without sleep."""
COMPUTING_SHARE = 0.5
"""And one that has a CPU, or waits for one, for so much of the time computes."""
RECENT_LOOKS = 7
"""So many looks say whether a process is awake: where a CPU is stolen for a moment, one or two of
them see nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class ThreadTimes:
    """One thread's since its start, seconds. `num_turns`: how often it was given a CPU."""

    ran_s: float
    queued_s: float
    num_turns: int
    is_runnable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class CpuTimes:
    """What the kernel says at one time. `stolen_s`: of each CPU, by name."""

    threads: Mapping[int, ThreadTimes]
    stolen_s: Mapping[str, float]


def denied_between(before: CpuTimes, after: CpuTimes, interval_s: float) -> float:
    """How much of the interval between two looks the process was kept from computing: what its
    worst thread waited, since the others wait for that one; and what was stolen of the worst
    CPU. Threads that want no CPU, and those that only look whether a lock is free, are kept from
    nothing: whoever holds the lock is, and what the others would do with a CPU is to look again."""
    waits = [
        _queued_between(then, now, interval_s)
        for then, now in _pairs(before, after)
        if not _sleeps(then, now) and not _looks_for_lock(then, now, interval_s)
    ]
    if not waits:
        return 0.0
    stolen = [
        total - before.stolen_s[name]
        for name, total in after.stolen_s.items()
        if name in before.stolen_s
    ]
    return max(0.0, min(interval_s, max(waits) + max(stolen, default=0.0)))


def is_awake(before: CpuTimes, after: CpuTimes, interval_s: float) -> bool:
    """Whether some thread computed, wanted to, or waited for a lock of the interpreter's kind,
    all the time between two looks. One that waits for a disk or for news does neither."""
    for then, now in _pairs(before, after):
        if now.num_turns - then.num_turns >= LOCK_TURNS * interval_s:
            return True
        wanted_s = now.ran_s - then.ran_s + _queued_between(then, now, interval_s)
        if wanted_s >= COMPUTING_SHARE * interval_s:
            return True
    return False


def _pairs(before: CpuTimes, after: CpuTimes) -> Iterator[tuple[ThreadTimes, ThreadTimes]]:
    """Each thread that both looks saw."""
    for thread_id, then in before.threads.items():
        now = after.threads.get(thread_id)
        if now is not None:
            yield then, now


def _queued_between(then: ThreadTimes, now: ThreadTimes, interval_s: float) -> float:
    """How long a thread waited for a CPU. A wait is added up by the kernel when it ends, so that
    this may be more than the interval."""
    queued_s = now.queued_s - then.queued_s
    if now.num_turns == then.num_turns and then.is_runnable and now.is_runnable:
        # No change of hands: it was on its CPU, or in the queue and still is.
        queued_s = max(queued_s, interval_s - (now.ran_s - then.ran_s))
    return queued_s


def _sleeps(then: ThreadTimes, now: ThreadTimes) -> bool:
    """Whether a thread never wanted a CPU."""
    return now.num_turns == then.num_turns and not then.is_runnable and not now.is_runnable


def _looks_for_lock(then: ThreadTimes, now: ThreadTimes, interval_s: float) -> bool:
    """Whether all that a thread did was to look, again and again, whether a lock is free."""
    num_turns = now.num_turns - then.num_turns
    ran_s = now.ran_s - then.ran_s
    slept_s = interval_s - ran_s - _queued_between(then, now, interval_s)
    return (
        num_turns >= LOCK_TURNS * interval_s
        and ran_s <= LOCK_TURN_S * num_turns
        and slept_s >= LOCK_SLEEP_S * num_turns
    )


class StarvationMeter:
    """Adds up what one process was denied while it was looked at. Costs nothing between a `rest`
    and the next `look`."""

    def __init__(self, read: Callable[[], CpuTimes]) -> None:
        self.denied_s = 0.0
        self._read = read
        self._awake: deque[bool] = deque(maxlen=RECENT_LOOKS)
        self._last: tuple[float, CpuTimes] | None = None

    @property
    def num_awake(self) -> int:
        """Of the last RECENT_LOOKS looks, those before which it was awake."""
        return sum(self._awake)

    def look(self, now: float) -> None:
        """Count from the last look to this one; the first is where counting begins."""
        times = self._read()
        if self._last is not None:
            then, known = self._last
            self.denied_s += denied_between(known, times, now - then)
            awake = now > then and is_awake(known, times, now - then)
            self._awake.append(awake)
        self._last = (now, times)

    def rest(self, now: float) -> None:
        """Count to now, and no further until the next look."""
        if self._last is not None:
            self.look(now)
            self._last = None


def process_meter(pid: int) -> StarvationMeter:
    """A meter of a process of this machine. Where the kernel keeps no such account, and of a
    process that is gone, nothing is counted."""
    return StarvationMeter(lambda: CpuTimes(_read_threads(pid), _read_stolen()))


def _read_threads(pid: int) -> dict[int, ThreadTimes]:
    found: dict[int, ThreadTimes] = {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for name in names:
        times = _read_thread(f"/proc/{pid}/task/{name}")
        if times is not None:
            found[int(name)] = times
    return found


def _read_thread(folder: str) -> ThreadTimes | None:
    try:
        with open(f"{folder}/schedstat", "rb") as file:
            ran_ns, queued_ns, num_turns = map(int, file.read().split())
        with open(f"{folder}/stat", "rb") as file:
            line = file.read()
    except (OSError, ValueError):
        return None  # it has ended, or the kernel was built without
    # The name in parentheses may hold anything; the state follows the last of them.
    is_runnable = line[line.rfind(b")") + 2 :].startswith(b"R")
    return ThreadTimes(ran_ns / 1e9, queued_ns / 1e9, num_turns, is_runnable)


def _read_stolen() -> dict[str, float]:
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return parse_stolen(file)
    except OSError:
        return {}


def parse_stolen(lines: Iterable[str]) -> dict[str, float]:
    """Seconds by CPU, from the first lines of /proc/stat."""
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = {}
    for line in lines:
        name, *fields = line.split()
        if not name.startswith("cpu"):
            break
        if name != "cpu" and len(fields) > 7:
            found[name] = int(fields[7]) * tick_s
    return found
