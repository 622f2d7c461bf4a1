"""How `xllm serve` ends: drained, at once, killed; and what it leaves behind (nothing)."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, alive, wait_until
from xllm import Client
from xllm.cli.launcher import SIGNAL_ECHO_S
from xllm.errors import XllmError

pytestmark = pytest.mark.process

ORPHAN_S = 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")


def test_an_idle_service_ends_at_once(model, run_dir):
    served = Served(model, run_dir)
    family = served.family()
    began = time.monotonic()
    served.interrupt()
    assert served.wait() == 0
    assert time.monotonic() - began < 10
    wait_until(lambda: not alive(family), ORPHAN_S, "the end of all processes")
    assert os.listdir(run_dir) == []
    assert "draining" in served.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_open_requests_are_finished(model, run_dir, number):
    served = Served(model, run_dir, "--worker-toy-step-ms", "40")
    with Client(served.zmq, timeout_s=30) as client:
        stream = client.stream((70, 71), max_tokens=40, seed=3, hold_ms=0)
        passing = iter(stream)
        next(passing)
        served.process.send_signal(number)
        list(passing)
        assert stream.completion.token_ids == expected_ids(model, (70, 71), 40, seed=3)
    assert served.wait() == 0
    assert os.listdir(run_dir) == []


def test_drain_ends_in_time(model, run_dir):
    served = Served(model, run_dir, "--worker-toy-step-ms", "100", "--cluster-shutdown-s", "1")
    with Client(served.zmq, timeout_s=30) as client:
        stream = client.stream((70, 71), max_tokens=2000, hold_ms=0)
        passing = iter(stream)
        next(passing)
        began = time.monotonic()
        served.interrupt()
        with pytest.raises(XllmError):
            list(passing)
        assert served.wait() == 0
        assert time.monotonic() - began < 8


def test_a_second_interrupt_stops_at_once(model, run_dir):
    served = Served(model, run_dir, "--worker-toy-step-ms", "500")
    family = served.family()
    with Client(served.zmq, timeout_s=30) as client:
        stream = client.stream((70, 71), max_tokens=2000, hold_ms=0)
        passing = iter(stream)
        next(passing)
        first = time.monotonic()
        served.interrupt()
        wait_until(lambda: "draining" in served.text)
        wait_until(lambda: time.monotonic() - first > 5 * SIGNAL_ECHO_S)
        assert alive(family)
        began = time.monotonic()
        served.interrupt()
        assert served.wait() == 130
        assert time.monotonic() - began < ORPHAN_S
        stream.close()
    wait_until(lambda: not alive(family), ORPHAN_S, "the end of all processes")
    assert os.listdir(run_dir) == []


def test_sigkill_of_the_launcher_leaves_no_orphan(model, run_dir):
    served = Served(model, run_dir)
    family = served.family()
    assert len(family) >= 5
    served.kill()
    wait_until(lambda: not alive(family), ORPHAN_S, "the end of all processes")
    stale = os.listdir(run_dir)
    assert len(stale) == 1
    with Served(model, run_dir) as second:
        assert stale[0] not in os.listdir(run_dir)
        with Client(second.zmq, timeout_s=30) as client:
            assert client.generate((70,), max_tokens=3, seed=1).usage.completion_tokens == 3
    assert os.listdir(run_dir) == []


def test_sigkill_of_any_child_is_survived(model, run_dir):
    seen = set()
    with Served(model, run_dir) as served:
        for kind in ("router", "master", "worker", "kvcache"):
            with Client(served.zmq, timeout_s=30) as client:
                wait_until(lambda: _answers(client, model), what=f"an answer before {kind}'s end")
            seen |= set(served.family())
            victim = served.child(kind)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in served.family(), ORPHAN_S, f"the end of {kind}")
            wait_until(lambda: served.child(kind) != victim, what=f"the next life of {kind}")
        with Client(served.zmq, timeout_s=30) as client:
            wait_until(lambda: _answers(client, model), what="an answer at last")
        seen |= set(served.family())
    assert served.process.returncode == 0
    wait_until(lambda: not alive(seen), ORPHAN_S, "the end of all processes")
    assert os.listdir(run_dir) == []


def test_a_start_that_fails_says_why(model, run_dir):
    with Served(model, run_dir) as first:
        port = first.http.split(":")[2].split("/")[0]
        second = Served(model, run_dir, "--port", port, ready=False)
        assert second.wait(10) == 71
        assert f"{port}: in use already" in second.text
        assert len(second.errors) == 1


def _answers(client, model) -> bool:
    try:
        done = client.generate((70, 71), max_tokens=20, seed=2)
    except XllmError:
        return False
    assert done.token_ids == expected_ids(model, (70, 71), 20, seed=2)
    return True
