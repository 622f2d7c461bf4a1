"""Ranks connected by gloo: sums and gathers, and what becomes of those who are left alone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Self

import pytest
import torch

from tests.worker.collectives.rank_threads import on_all, wired_boards
from xllm.errors import ConfigError, EngineError
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.collectives.ranks import OneRank
from xllm.worker.rank_board import RankBoard


class Group:
    """Ranks of this process that met."""

    def __init__(self, size: int, timeout_s: float = 30.0, ticks: list[int] | None = None) -> None:
        self.size = size
        tick = (lambda: ticks.append(1)) if ticks is not None else (lambda: None)
        self.ranks = [GlooRanks(rank, size, "127.0.0.1", timeout_s, tick) for rank in range(size)]
        self.meet("first")

    def meet(self, name: str) -> None:
        boards = wired_boards(self.size, name)
        on_all(self.size, lambda rank: self.ranks[rank].join(boards[rank]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        on_all(self.size, lambda rank: self.ranks[rank].leave())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_all_parts_and_alike_everywhere(size, dtype):
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn((size, 5, 33), generator=generator).to(dtype)
    with Group(size) as group:
        sums = on_all(size, lambda rank: group.ranks[rank].begin_sum(parts[rank]).wait())
        gathered = on_all(size, lambda rank: group.ranks[rank].gather(parts[rank]))
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    assert all(torch.equal(found, expected) for found in sums)
    assert all(torch.equal(found, parts) for found in gathered)


def test_a_row_has_the_same_sum_whatever_stands_beside_it():
    parts = torch.randn((3, 64, 40), generator=torch.Generator().manual_seed(2))
    with Group(3) as group:
        whole = on_all(3, lambda rank: group.ranks[rank].begin_sum(parts[rank]).wait())[0]
        for count in (1, 7, 30):
            few = on_all(3, lambda rank: group.ranks[rank].begin_sum(parts[rank, :count]).wait())
            assert torch.equal(few[0], whole[:count])


def test_two_sums_may_be_under_way():
    parts = torch.randn((2, 2, 300), generator=torch.Generator().manual_seed(3))

    def work(rank: int) -> list[torch.Tensor]:
        pending = [group.ranks[rank].begin_sum(part) for part in parts[rank]]
        return [one.wait() for one in reversed(pending)]

    with Group(2) as group:
        for second, first in on_all(2, work):
            assert torch.equal(first, parts[0, 0] + parts[1, 0])
            assert torch.equal(second, parts[0, 1] + parts[1, 1])


def test_ranks_that_are_about_to_do_different_things_are_told():
    with Group(2) as group:
        on_all(2, lambda rank: group.ranks[rank].agree((3, 4)))

        def differ(rank: int) -> None:
            with pytest.raises(EngineError, match=r"rank \d is at \[3, \d\], rank \d"):
                group.ranks[rank].agree((3, rank))

        on_all(2, differ)


def test_who_waits_for_a_rank_that_left_is_freed_and_they_meet_again():
    with Group(2) as group:

        def work(rank: int) -> None:
            if rank == 1:
                group.ranks[1].leave()
                with pytest.raises(EngineError, match="have parted"):
                    group.ranks[1].gather(torch.ones(2))
                return
            began = time.monotonic()
            with pytest.raises(EngineError, match="a collective of the ranks failed"):
                group.ranks[0].gather(torch.ones(2))
            assert time.monotonic() - began < 15.0

        on_all(2, work)
        group.meet("second")
        assert on_all(2, lambda rank: group.ranks[rank].gather(torch.ones(1)).sum().item()) == [
            2,
            2,
        ]


def test_leaving_with_a_sum_under_way_does_not_wait_for_ever():
    with Group(2, timeout_s=0.5) as group:
        group.ranks[0].begin_sum(torch.ones(3))
        group.ranks[0].leave()


def test_a_silent_rank_is_an_error_in_time_and_the_wait_is_seen():
    ticks: list[int] = []
    with Group(2, timeout_s=0.5, ticks=ticks) as group, pytest.raises(EngineError, match="Timed"):
        group.ranks[0].gather(torch.ones(2))
    assert len(ticks) >= 2


def test_nobody_comes():
    ranks = GlooRanks(0, 2, "127.0.0.1", 0.2, lambda: None)
    board = RankBoard("alone")
    board.open(lambda key, value: None)
    with pytest.raises(EngineError, match="did not come"):
        ranks.join(board)


def test_a_meeting_that_is_replaced_ends_at_once():
    ranks = GlooRanks(0, 2, "127.0.0.1", 60.0, lambda: None)
    board = RankBoard("old")
    board.open(lambda key, value: None)
    timer = threading.Timer(0.05, board.close)
    timer.start()
    with pytest.raises(EngineError, match="another name"):
        ranks.join(board)
    timer.join()


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::", ""])
def test_an_address_that_is_not_ours_or_is_every_one_is_refused(host):
    board = RankBoard("g")
    with pytest.raises(ConfigError, match="collective_host"):
        GlooRanks(0, 2, host, 1.0, lambda: None).join(board)


def test_only_the_address_that_was_asked_for_listens():
    before = _listening()
    with Group(2):
        addresses = _listening() - before
    assert addresses
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}


def _listening() -> set[str]:
    """Local addresses of this process's listening TCP sockets, as the kernel writes them."""
    mine = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            mine.add(os.readlink(f"/proc/self/fd/{name}"))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(fields[1])
    return found


def test_one_rank_needs_nobody():
    part = torch.ones(2, 3)
    ranks = OneRank()
    ranks.agree((1,))
    assert ranks.begin_sum(part).wait() is part
    assert torch.equal(ranks.gather(part), part[None])
