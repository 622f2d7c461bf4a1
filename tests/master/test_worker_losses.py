"""What routers are told of a worker's end: whether a request of its step may be the reason."""

from __future__ import annotations

import asyncio
import signal

import pytest

from xllm.master import process_state, worker_losses
from xllm.master.process_state import count_oom_kills, ended_by_itself
from xllm.master.worker_losses import WorkerLosses


class Told:
    """Losses as an owner hears of them; nothing happens later unless a test says so."""

    def __init__(self):
        self.words = []
        self.timers = []
        self.losses = WorkerLosses(self.tell, self.later)

    def tell(self, reason, by_itself):
        self.words.append((reason, by_itself))

    def later(self, delay_s, call):
        assert delay_s == worker_losses.VERDICT_S
        self.timers.append(call)
        loop = asyncio.new_event_loop()
        handle = loop.call_later(1000.0, call)
        loop.close()
        return handle


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_lost_connection_is_told_with_the_end_of_its_process(by_itself):
    told = Told()
    told.losses.lost_connection(0, "the connection is lost")
    assert told.words == []
    told.losses.process_ended(1, "another one", by_itself=True)
    assert told.words == []
    told.losses.process_ended(0, "signal", by_itself=by_itself)
    assert told.words == [("signal", by_itself)]
    told.losses.process_ended(0, "signal", by_itself=True)
    told.losses.settle()
    assert len(told.words) == 1


def test_a_process_that_lives_on_is_not_waited_for():
    told = Told()
    told.losses.lost_connection(0, "the connection is lost")
    [over] = told.timers
    over()
    assert told.words == [("the connection is lost", True)]
    told.losses.process_ended(0, "signal", by_itself=False)
    assert len(told.words) == 1


def test_the_next_loss_waits_for_no_earlier_one():
    told = Told()
    told.losses.lost_connection(0, "first")
    told.losses.lost("second", by_itself=False)
    assert told.words == [("first", True), ("second", False)]
    told.losses.lost_connection(0, "third")
    told.losses.close()
    told.losses.settle()
    assert len(told.words) == 2


@pytest.mark.parametrize(
    ("code", "by_itself"),
    [
        (-signal.SIGSEGV, True),
        (-signal.SIGABRT, True),
        (-signal.SIGBUS, True),
        (1, True),
        (70, True),
        (0, False),
        (128 + signal.SIGTERM, False),
        (-signal.SIGTERM, False),
        (-signal.SIGINT, False),
        (-signal.SIGKILL, False),
    ],
)
def test_who_ended_a_process_is_seen_by_its_exit_code(code, by_itself):
    assert ended_by_itself(code, may_be_oom=False) == by_itself
    out_of_memory = code == -signal.SIGKILL
    assert ended_by_itself(code, may_be_oom=True) == (by_itself or out_of_memory)


def test_the_kernel_counts_whom_it_killed_for_memory(monkeypatch, tmp_path):
    assert count_oom_kills() >= -1
    found = tmp_path / "vmstat"
    monkeypatch.setattr(process_state, "_VMSTAT", str(found))
    assert count_oom_kills() == -1
    found.write_text("pgfault 7\noom_kill 3\nnr_free 1\n")
    assert count_oom_kills() == 3
    found.write_text("pgfault 7\n")
    assert count_oom_kills() == -1
