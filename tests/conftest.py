"""What all tests share: hypothesis's profiles, run directories, and the leak guard."""

from __future__ import annotations

import gc
import os
import pathlib
import shutil
import signal
import tempfile
import time
import uuid
from multiprocessing import resource_tracker

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from tests.leaks import MARK, Leaks
from xllm.config.environment import prepare_environment

prepare_environment()

# Without a GPU Triton interprets its kernels. It reads this as it is imported, by whichever test.
if not pathlib.Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would every process of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes an example slow, never wrong: no deadline by the clock.
_SLOW_IS_FINE = [HealthCheck.too_slow]
hypothesis_settings.register_profile(
    "default", deadline=None, database=None, suppress_health_check=_SLOW_IS_FINE
)
hypothesis_settings.register_profile(
    "ci", deadline=None, database=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE
)
hypothesis_settings.load_profile("ci" if os.environ.get("CI") else "default")

LEAK_DEADLINE_S = 5.0
os.environ[MARK] = uuid.uuid4().hex


@pytest.fixture
def run_dir():
    """A short-named 0700 directory for sockets: an ipc path holds 107 bytes, tmp_path may not."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="xr-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def _once_a_process():
    """What libraries open once and keep: libuv's signal pipe, multiprocessing's tracker."""
    uvloop.new_event_loop().close()
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def _fresh_logs():
    """What a test sets up for logs ends with it: its captured streams are closed by then."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture(autouse=True)
def _leak_guard(request):
    """A test that starts processes leaves none behind, nor descriptors, nor shared memory."""
    if request.node.get_closest_marker("process") is None:
        yield
        return
    request.getfixturevalue("_once_a_process")
    before = Leaks()
    yield
    deadline = time.monotonic() + LEAK_DEADLINE_S
    while (leaks := Leaks().since(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    if leaks:
        pytest.fail(f"left behind: {'; '.join(leaks)}", pytrace=False)
