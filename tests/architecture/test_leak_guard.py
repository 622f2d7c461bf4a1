"""The leak guard sees what it is there for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing import shared_memory

from tests.leaks import Leaks


def test_nothing_new_is_no_leak():
    before = Leaks()
    assert Leaks().since(before) == []


def test_descriptors_are_seen(tmp_path):
    before = Leaks()
    with open(tmp_path / "file", "w"), socket.socket():
        fd = os.memfd_create("left")
        leaks = Leaks().since(before)
        os.close(fd)
    assert len(leaks) == 3
    assert any("socket" in leak for leak in leaks)
    assert Leaks().since(before) == []


def test_orphans_are_seen():
    # The grandchild outlives its parent and is nobody's child that we know of.
    script = (
        "import subprocess, sys;"
        "p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE,"
        " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(p.pid, flush=True); input()"
    )
    before = Leaks()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        grandchild = int(parent.stdout.readline())
        leaks = [leak for leak in Leaks().since(before) if leak.startswith("process")]
        assert any(f"process {grandchild} " in leak for leak in leaks)
        assert any(f"process {parent.pid} " in leak for leak in leaks)
        parent.kill()


def test_shared_memory_is_seen():
    before = Leaks()
    segment = shared_memory.SharedMemory(create=True, size=16)
    try:
        leaks = Leaks().since(before)
    finally:
        segment.close()
        segment.unlink()
    assert any(leak == f"/dev/shm/{segment.name}" for leak in leaks)
    assert Leaks().since(before) == []
