"""Clocks that step or differ, in processes that are asked what time it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from xllm.cli.chaos import other_clock
from xllm.cli.chaos.wall_clock import WallClock

pytestmark = pytest.mark.process
ASK = (
    "import os, sys, time, datetime\n"
    "for line in sys.stdin:\n"
    "    day = datetime.datetime.now(datetime.timezone.utc).timestamp()\n"
    "    print(os.getpid(), time.time(), day, time.monotonic(), flush=True)\n"
)
STEP_S = 3600
NEAR_S = 300
"""Much less than a step, much more than a process takes to answer."""


@pytest.fixture(scope="module")
def clock(tmp_path_factory):
    made = WallClock(tmp_path_factory.mktemp("clock"))
    made.build()
    return made


class Told:
    """A process that says its time whenever it is asked."""

    def __init__(self, *wrapper):
        command = [*wrapper, sys.executable, "-c", ASK]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()
        assert self.process.returncode == 0

    def times(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        pid, *found = self.process.stdout.readline().split()
        assert int(pid) == self.process.pid
        return [float(one) for one in found]


def test_a_running_process_sees_its_clock_step_and_its_monotonic_one_stand(clock):
    with Told(*clock.wrapper) as one:
        sign = 1 if one.process.pid % 2 else -1
        for step in (0, STEP_S, -STEP_S, 0):
            clock.step(step)
            assert clock.offset_of(one.process.pid, step) == sign * step
            wall, day, monotonic = one.times()
            assert wall - time.time() == pytest.approx(sign * step, abs=NEAR_S)
            assert day - time.time() == pytest.approx(sign * step, abs=NEAR_S)
            assert monotonic == pytest.approx(time.monotonic(), abs=NEAR_S)


def test_a_clock_of_ones_own():
    if reason := other_clock.why_not():
        pytest.skip(reason)  # CAP_SYS_ADMIN, which containers seldom have
    ahead_s = other_clock.AHEAD_S
    with Told(*other_clock.wrapper()) as one:
        wall, _, monotonic = one.times()
        assert monotonic - time.monotonic() == pytest.approx(ahead_s, abs=NEAR_S)
        assert wall == pytest.approx(time.time(), abs=NEAR_S)
        assert other_clock.offset_of(one.process.pid) == ahead_s
    assert other_clock.offset_of(os.getpid()) == 0
