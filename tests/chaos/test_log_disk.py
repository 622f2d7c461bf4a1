"""A disk that gets full and empty again, by both of its means."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from xllm.cli.chaos.log_disk import LogDisk

pytestmark = pytest.mark.process
WRITE = (
    "import sys\n"
    "file = open(sys.argv[1], 'ab', buffering=0)\n"
    "for line in sys.stdin:\n"
    "    try:\n"
    "        file.write(b'x' * 65536)\n"
    "        print(0, flush=True)\n"
    "    except OSError as error:\n"
    "        print(error.errno, flush=True)\n"
)


@pytest.fixture(params=["mounted", "limited"])
def disk(request, tmp_path):
    one = LogDisk(tmp_path / "log", keep=True)
    if request.param == "limited":
        (tmp_path / "log").mkdir()
    else:
        one.mount()
        if not one.is_mounted:
            pytest.skip("this process may not mount")
    yield one
    one.close()


def test_writes_fail_while_it_is_full(disk, tmp_path):
    path = tmp_path / "log" / "one.log"
    command = [sys.executable, "-c", WRITE, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write():
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    assert write() == 0
    disk.fill([process.pid])
    assert disk.is_full()
    assert write() == (errno.ENOSPC if disk.is_mounted else errno.EFBIG)
    disk.empty()
    size = path.stat().st_size
    assert write() == 0
    process.communicate()
    disk.close()
    assert path.stat().st_size == size + 65536  # the log is kept
