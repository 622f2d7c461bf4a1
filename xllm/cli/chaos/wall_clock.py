"""Wall clocks that step: a small library, loaded before all others, that adds to the time of day.

The machine's clock is left alone. The library is compiled when a cluster needs it, and stands
before libc's `clock_gettime`, `gettimeofday` and `time` in every process of the cluster: Python,
uvloop, ZeroMQ and gRPC read the time of day by these. What it adds stands in a file that all map:
one process in two gets the step ahead, the others as much back, by the parity of their pids.
Monotonic clocks stay as they are.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from xllm.errors import DependencyError

_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_S = 60.0
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *step;
static int (*libc_clock)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CHAOS_WALL_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    libc_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (file >= 0) {
        void *page = mmap(0, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
        if (page != MAP_FAILED) step = page;
        close(file);
    }
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!libc_clock) begin();
    int failed = libc_clock(clock, now);
    if (!failed && step && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += getpid() % 2 ? *step : -*step;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &fine)) return -1;
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return (time_t)-1;
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"""


def why_not() -> str:
    """What this machine lacks for it; empty: nothing."""
    return "" if _compiler() else f"no C compiler: none of {', '.join(_COMPILERS)}"


class WallClock:
    """The time of day of all processes that `wrapper` starts."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "wall-clock"
        self._library = directory / "wall-clock.so"
        self.step(0)

    def build(self) -> None:
        """Compile the library. DependencyError."""
        compiler = _compiler()
        if not compiler:
            raise DependencyError(why_not(), param="scenario")
        source = self._library.with_suffix(".c")
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self._library), str(source)]
        done = subprocess.run(
            [*command, "-ldl"], capture_output=True, text=True, timeout=_COMPILE_S, check=False
        )
        if done.returncode:
            raise DependencyError(f"{compiler}: {done.stderr.strip()[-500:]}", param="scenario")

    @property
    def wrapper(self) -> tuple[str, ...]:
        """What stands before the command of a process whose clock is to obey."""
        return ("env", f"LD_PRELOAD={self._library}", f"CHAOS_WALL_CLOCK={self._file}")

    def step(self, seconds: int) -> None:
        """From now on clocks are so far from the machine's: ahead where the pid is odd, behind
        where it is even."""
        data = struct.pack("q", seconds)
        if not self._file.exists():
            self._file.write_bytes(data)
            return
        with self._file.open("r+b") as file:  # in place: it is mapped
            file.write(data)

    def offset_of(self, pid: int, seconds: int) -> int:
        """Where the clock of a process is after `step(seconds)`."""
        return seconds if pid % 2 else -seconds


def _compiler() -> str:
    return next((path for name in _COMPILERS if (path := shutil.which(name))), "")
