"""The board of notices: heard once it is there, closed by another meeting."""

from __future__ import annotations

import threading

import pytest

from tests.worker.collectives.rank_threads import wired_boards
from xllm.errors import EngineError
from xllm.worker.rank_board import RankBoard


def test_a_notice_is_heard_by_all_and_by_its_rank():
    first, second, third = wired_boards(3)
    first.put("0", b"a")
    second.put("1", b"b")
    for board in (first, second, third):
        assert (board.get("0", 0.0), board.get("1", 0.0)) == (b"a", b"b")


def test_who_waits_is_woken_by_the_notice():
    board = RankBoard("g")
    timer = threading.Timer(0.05, board.hear, ("0", b"late"))
    timer.start()
    assert board.get("0", 30.0) == b"late"
    timer.join()


def test_a_rank_that_does_not_come_is_an_error():
    with pytest.raises(EngineError, match="did not come within 0 s"):
        RankBoard("g").get("0", 0.01)


def test_a_closed_board_lets_nobody_wait():
    board = RankBoard("g")
    board.hear("0", b"x")
    timer = threading.Timer(0.05, board.close)
    timer.start()
    with pytest.raises(EngineError, match="another name"):
        board.get("1", 30.0)
    timer.join()
    assert board.is_closed_within(0.0)
    with pytest.raises(EngineError, match="another name"):
        board.get("0", 30.0)


def test_an_open_board_is_not_closed_within_a_moment():
    assert not RankBoard("g").is_closed_within(0.01)
