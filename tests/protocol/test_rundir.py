"""Run directories under concurrent starters: each gets one, and nobody takes another's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xllm.errors import ConfigError
from xllm.protocol.actor.rundir import RunDirectory, sweep

NUM_STARTERS = 4
STARTER = """
import os, sys
from xllm.errors import ConfigError
from xllm.protocol.actor.rundir import RunDirectory

sys.stdin.read()  # all of them begin together
for _ in range(150):
    held = RunDirectory(sys.argv[1])
    open(os.path.join(held.path, "socket"), "w").close()
    assert os.path.exists(os.path.join(held.path, "lock"))
    held.remove()
"""


@pytest.mark.process
def test_concurrent_starters_do_not_take_each_others_directories(run_dir):
    base = str(run_dir / "base")
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, base],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_STARTERS)
    ]
    for starter in starters:
        starter.stdin.close()
        starter.stdin = None
    for starter in starters:
        _, errors = starter.communicate(timeout=60)
        assert starter.returncode == 0, errors
    assert os.listdir(base) == []


def test_a_directory_in_the_making_is_left_alone_unless_its_maker_is_long_dead(tmp_path):
    fresh, old = tmp_path / ".new-fresh", tmp_path / ".new-old"
    for path in (fresh, old, tmp_path / ".other"):
        path.mkdir()
    os.utime(old, (1, 1))
    assert sweep(str(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == [".new-fresh", ".other"]
    RunDirectory(str(tmp_path)).remove()
    assert fresh.exists()


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_parent_that_was_there_keeps_its_mode(tmp_path, mode):
    tmp_path.chmod(mode)
    RunDirectory(str(tmp_path)).remove()
    assert tmp_path.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("mode", [0o1777, 0o775])
def test_a_parent_where_others_may_write_is_refused_and_left_alone(tmp_path, mode):
    tmp_path.chmod(mode)
    (tmp_path / "run-of-somebody").mkdir()
    with pytest.raises(ConfigError, match=rf"cluster\.run_dir: {tmp_path} .*mode {mode:04o}"):
        RunDirectory(str(tmp_path))
    assert tmp_path.stat().st_mode & 0o7777 == mode
    assert os.listdir(tmp_path) == ["run-of-somebody"]


def test_a_parent_that_is_no_directory_is_refused(tmp_path):
    for base in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=rf"cluster\.run_dir: {base} "):
            RunDirectory(str(base))
