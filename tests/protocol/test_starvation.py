"""What a process was denied of the CPU, from the kernel's counts; and from a real process."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.protocol.actor.starvation import (
    CpuTimes,
    StarvationMeter,
    ThreadTimes,
    denied_between,
    is_awake,
    parse_stolen,
    process_meter,
)


def times(*threads: ThreadTimes, stolen: float = 0.0) -> CpuTimes:
    return CpuTimes(dict(enumerate(threads)), {"cpu0": stolen, "cpu1": 0.0})


def test_a_thread_that_computes_or_sleeps_is_denied_nothing():
    computes = times(ThreadTimes(1.0, 0.5, 10, True)), times(ThreadTimes(1.2, 0.5, 10, True))
    assert denied_between(*computes, 0.2) < 1e-9
    sleeps = times(ThreadTimes(1.0, 0.5, 10, False)), times(ThreadTimes(1.0, 0.5, 10, False))
    assert denied_between(*sleeps, 0.2) == 0.0
    woke = times(ThreadTimes(1.0, 0.5, 10, False)), times(ThreadTimes(1.01, 0.51, 12, True))
    assert abs(denied_between(*woke, 0.2) - 0.01) < 1e-9


def test_the_thread_that_waits_longest_counts():
    before = times(ThreadTimes(0, 0, 0, True), ThreadTimes(0, 0, 0, True))
    after = times(ThreadTimes(0.15, 0.05, 3, True), ThreadTimes(0.05, 0.15, 3, True))
    assert abs(denied_between(before, after, 0.2) - 0.15) < 1e-9


def test_a_thread_that_still_waits_is_counted_before_the_kernel_does():
    still = ThreadTimes(1.0, 0.5, 10, True)
    assert denied_between(times(still), times(still), 0.2) == 0.2
    # When it gets its turn the kernel adds the whole wait: it counts once.
    assert denied_between(times(still), times(ThreadTimes(1.0, 5.5, 11, True)), 0.2) == 0.2


def test_what_the_hypervisor_took_is_denied_to_threads_that_want_a_cpu():
    sleeps, looks = ThreadTimes(1.0, 0.5, 10, False), ThreadTimes(0.0, 0.0, 0, False)
    looked = ThreadTimes(0.001, 0.0, 30, False)
    quiet = times(sleeps, looks), times(sleeps, looked, stolen=0.15)
    assert denied_between(*quiet, 0.2) == 0.0
    for works in (ThreadTimes(1.02, 0.5, 11, False), ThreadTimes(1.0, 0.5, 10, True)):
        denied_s = denied_between(quiet[0], times(works, looked, stolen=0.15), 0.2)
        assert abs(denied_s - 0.15) < 1e-9


def test_a_process_is_awake_that_computes_or_waits_for_the_interpreter():
    def awake(ran_s, num_turns):
        return is_awake(
            times(ThreadTimes(1.0, 0, 10, False), ThreadTimes(5.0, 0, 10, False)),
            times(
                ThreadTimes(1.0, 0, 11, False), ThreadTimes(5.0 + ran_s, 0, 10 + num_turns, False)
            ),
            0.25,
        )

    assert awake(0.2, 1)
    assert awake(0.001, 50)
    assert not awake(0.001, 3)
    assert not is_awake(times(), times(ThreadTimes(9.0, 0, 900, True)), 0.25)


def test_a_thread_that_wants_a_cpu_and_gets_none_is_awake():
    still = times(ThreadTimes(1.0, 0.5, 10, True))
    assert is_awake(still, still, 0.1)
    assert is_awake(still, times(ThreadTimes(1.01, 0.55, 13, False)), 0.1)
    assert not is_awake(still, times(ThreadTimes(1.01, 0.52, 13, False)), 0.1)


@pytest.mark.parametrize(
    ("ran_s", "queued_s", "num_turns", "is_denied"),
    [
        (30e-6 * 12, 0.06, 12, False),  # sleeps 5 ms, waits as long for a CPU, looks
        (30e-6 * 12, 0.119, 12, True),  # wants a CPU all the time and is driven off it at once
        (3e-3 * 12, 0.06, 12, True),  # computes by turns
        (30e-6 * 3, 0.06, 3, True),  # gets a CPU too seldom to say
    ],
)
def test_nobody_waits_for_a_thread_that_only_looks_for_a_lock(
    ran_s, queued_s, num_turns, is_denied
):
    before = times(ThreadTimes(1.0, 0.5, 10, False))
    after = times(ThreadTimes(1.0 + ran_s, 0.5 + queued_s, 10 + num_turns, False))
    assert abs(denied_between(before, after, 0.12) - queued_s * is_denied) < 1e-9


def test_the_last_looks_that_found_it_awake_are_counted():
    turns = [0, 60, 120, 120, *range(180, 600, 60), 600, 600, 600]
    looks = iter([times(ThreadTimes(0, 0, number, False)) for number in turns])
    meter = StarvationMeter(lambda: next(looks))
    seen = []
    for number in range(len(turns)):
        meter.look(number * 0.25)
        seen.append(meter.num_awake)
    assert seen == [0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 7, 7, 6, 5]


def test_threads_that_come_and_go_count_nothing():
    one = ThreadTimes(1.0, 0.5, 10, True)
    assert denied_between(times(), times(one), 0.2) == 0.0
    assert denied_between(times(one), times(), 0.2) == 0.0


thread_times = st.builds(
    ThreadTimes, st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 1 << 40), st.booleans()
)
cpu_times = st.builds(
    CpuTimes,
    st.dictionaries(st.integers(1, 4), thread_times),
    st.dictionaries(st.sampled_from(["cpu0", "cpu1"]), st.floats(0, 1e6)),
)


@settings(max_examples=200, deadline=None)
@given(cpu_times, cpu_times, st.floats(0, 10.0))
def test_no_more_than_the_interval_is_denied(before, after, interval):
    assert 0.0 <= denied_between(before, after, interval) <= interval


def test_a_meter_counts_from_its_first_look_to_its_rest():
    still = times(ThreadTimes(1.0, 0.5, 10, True))
    meter = StarvationMeter(lambda: still)
    meter.rest(0.0)
    meter.look(1.0)
    assert meter.denied_s == 0.0
    meter.look(1.5)
    meter.rest(1.75)
    assert meter.denied_s == 0.75
    meter.rest(9.0)
    meter.look(10.0)
    assert meter.denied_s == 0.75


def test_stolen_time_is_read_by_cpu():
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    lines = ["cpu  1 2 3 4 5 6 7 99 0 0", "cpu0 1 2 3 4 5 6 7 60 0 0", "cpu1 1 2 3", "intr 5"]
    assert parse_stolen(lines) == {"cpu0": 60 * tick_s}


def test_processes_that_share_a_cpu_are_denied_it_and_stopped_ones_are_not():
    loop = [sys.executable, "-S", "-c", "while True: pass"]
    cpu = min(os.sched_getaffinity(0))
    with (
        subprocess.Popen(loop) as first,
        subprocess.Popen(loop) as second,
        subprocess.Popen(["sleep", "60"]) as stopped,
    ):
        try:
            stopped.send_signal(signal.SIGSTOP)
            for process in (first, second):
                os.sched_setaffinity(process.pid, {cpu})
            meters = [process_meter(process.pid) for process in (first, second, stopped)]
            deadline = time.monotonic() + 20
            while min(meter.denied_s for meter in meters[:2]) < 0.2:
                assert time.monotonic() < deadline
                for meter in meters:
                    meter.look(time.monotonic())
                time.sleep(0.02)
            # Of the third only what it wanted while it started.
            assert meters[2].denied_s < 0.5 * min(meters[0].denied_s, meters[1].denied_s)
        finally:
            for process in (first, second, stopped):
                process.kill()
    gone = process_meter(stopped.pid)
    gone.look(1.0)
    gone.look(2.0)
    assert gone.denied_s == 0.0
