"""The frame of a process: timers, failures, children, run directories."""

import asyncio
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import uvloop

from tests.protocol import children_targets
from xllm.errors import ConfigError, InvariantError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.children import Children, ChildSpec
from xllm.protocol.actor.run import YOUNG_OBJECTS
from xllm.protocol.actor.rundir import RunDirectory, sweep


def run(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 30))


class Recorder(Actor):
    """Writes down what happens to it."""

    def __init__(self, on_start=None):
        super().__init__("recorder")
        self.story = []
        self._on_start = on_start

    async def start(self):
        self.story.append("start")
        if self._on_start:
            self._on_start(self)

    async def stop(self):
        self.story.append("stop")


def test_an_actor_starts_serves_and_stops():
    async def main():
        actor = Recorder(lambda a: a.later(0.01, a.request_stop))
        assert await actor.run() == 0
        assert actor.story == ["start", "stop"]

    run(main())


def test_a_failing_timer_goes_on_and_a_broken_invariant_ends_the_process():
    async def main():
        calls = []

        def tick():
            calls.append(1)
            if len(calls) == 3:
                raise InvariantError("two and two are five")
            raise ValueError("just this once")

        actor = Recorder(lambda a: a.every(0.005, tick))
        assert await actor.run() == 70
        assert len(calls) == 3

    run(main())


def test_a_failed_start_still_stops_and_a_hanging_task_is_cancelled():
    async def main():
        def start(actor):
            actor.spawn(asyncio.Event().wait())
            raise ConfigError("no")

        actor = Recorder(start)
        with pytest.raises(ConfigError):
            await actor.run()
        assert actor.story == ["start", "stop"]
        assert not actor._tasks

    run(main())


@pytest.mark.process
def test_children_report_how_they_ended(tmp_path):
    async def main():
        exits = []
        children = Children(exits.append)
        children.start(ChildSpec("seven", children_targets.exit_with, ("7",)))
        children.start(ChildSpec("sleeper", children_targets.sleep_forever))
        with pytest.raises(InvariantError, match="runs already"):
            children.start(ChildSpec("sleeper", children_targets.sleep_forever))
        async with asyncio.timeout(10):
            while not exits:
                await asyncio.sleep(0.01)
        assert (exits[0].name, exits[0].code, exits[0].expected) == ("seven", 7, False)
        pid = children.pids["sleeper"]
        async with asyncio.timeout(10):
            while pathlib.Path(f"/proc/{pid}/comm").read_text() != "xllm:sleeper\n":
                await asyncio.sleep(0.01)
        assert os.getpgid(pid) == pid
        await children.stop_all(5)
        assert (exits[1].name, exits[1].code, exits[1].expected) == ("sleeper", -15, True)
        assert not children.pids

    run(main())


@pytest.mark.process
def test_a_child_that_ignores_sigterm_is_killed(tmp_path):
    async def main():
        exits = []
        children = Children(exits.append)
        flag = str(tmp_path / "deaf")
        children.start(ChildSpec("deaf", children_targets.ignore_sigterm, (flag,)))
        async with asyncio.timeout(10):
            while not os.path.exists(flag):
                await asyncio.sleep(0.01)
        await children.stop("deaf", 0.1)
        assert exits[0].code == -signal.SIGKILL

    run(main())


@pytest.mark.process
def test_children_and_grandchildren_die_with_a_killed_parent(tmp_path):
    pid_file = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.protocol.children_targets", "family", str(pid_file)],
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    pids = []
    while len(pids) < 2 and time.monotonic() < deadline:
        if pid_file.exists():
            pids = [int(line) for line in pid_file.read_text().split()]
        time.sleep(0.01)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 2
    alive = pids
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _is_running(pid)]
        time.sleep(0.01)
    assert not alive


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_run_directories_of_the_dead_are_swept(tmp_path):
    base = str(tmp_path / "base")
    live = RunDirectory(base)
    assert os.stat(live.path).st_mode & 0o777 == 0o700
    dead = os.path.join(base, "run-dead")
    os.mkdir(dead)
    open(os.path.join(dead, "socket"), "w").close()
    other = RunDirectory(base)
    assert sorted(os.listdir(base)) == sorted(map(os.path.basename, (live.path, other.path)))
    live.remove()
    other.remove()
    assert sweep(base) == 0
    assert os.listdir(base) == []


def test_a_run_directory_is_not_made_in_a_foreign_place(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with pytest.raises(ConfigError):
        RunDirectory(str(link))


ACTOR = """
import gc
from tests.fixtures.child_process import run_child
from xllm.protocol.actor.base import Actor

class Looker(Actor):
    async def start(self):
        print(gc.get_threshold()[0], gc.get_freeze_count() > 0, flush=True)
        self.request_stop()

run_child(lambda: Looker("looker"))
"""


def test_a_process_looks_for_cycles_among_many_young_objects_and_no_old_ones():
    done = subprocess.run([sys.executable, "-c", ACTOR], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(YOUNG_OBJECTS), "True"], done.stderr
    assert gc.get_threshold()[0] < YOUNG_OBJECTS
