"""Ranks on accelerators, their devices played: sums, gathers, meeting anew, errors."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time

import pytest
import torch

from tests.worker.collectives.fake_group import FakeCluster, FakeDistributed
from tests.worker.collectives.rank_threads import on_all, wired_boards
from xllm.errors import ConfigError, DependencyError, EngineError
from xllm.worker.collectives import placed
from xllm.worker.collectives.device_ranks import DeviceRanks
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.collectives.placed import PlacedRanks
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.platform import CollectiveKind


class Accelerator(CpuPlatform):
    """Its tensors are the host's."""

    name = "cuda"
    collectives: CollectiveKind = "nccl"


class Devices:
    """Ranks of this process, each with a torch.distributed of its own."""

    def __init__(self, size: int, can_abort: bool = True) -> None:
        cluster = FakeCluster(size)
        self.size = size
        self.apis = [FakeDistributed(cluster, can_abort) for _ in range(size)]
        self.ranks = [
            DeviceRanks(
                GlooRanks(rank, size, "127.0.0.1", 30.0, lambda: None), Accelerator(), 7.0, api
            )
            for rank, api in enumerate(self.apis)
        ]

    def meet(self, name: str) -> None:
        boards = wired_boards(self.size, name)
        on_all(self.size, lambda rank: self.ranks[rank].join(boards[rank]))

    def part(self) -> None:
        on_all(self.size, lambda rank: self.ranks[rank].leave())


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_gathers_are_those_of_hosts(size) -> None:
    """The same bits, in the same order of adding."""
    parts = torch.randn((size, 5, 33), generator=torch.Generator().manual_seed(1))
    devices = Devices(size)
    devices.meet("first")

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = devices.ranks[rank]
        mine.agree((3, 4))
        first, second = mine.begin_sum(parts[rank]), mine.begin_sum(parts[rank].t())
        return first.wait(), second.wait(), mine.gather(parts[rank, :2])

    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    for first, second, gathered in on_all(size, work):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected.t())
        assert torch.equal(gathered, parts[:, :2])
    for rank, api in enumerate(devices.apis):
        told = api.options
        assert (told["backend"], told["rank"], told["world_size"]) == ("nccl", rank, size)
        assert told["timeout"] == datetime.timedelta(seconds=7)
        assert told["device_id"] == torch.device("cpu")
    devices.part()


def test_what_ranks_agree_on_does_not_touch_the_devices() -> None:
    devices = Devices(2)
    devices.meet("first")
    before = [list(api.calls) for api in devices.apis]

    def differ(rank: int) -> None:
        devices.ranks[rank].agree((7, 7))
        with pytest.raises(EngineError, match=r"rank \d is at \[3, \d\]"):
            devices.ranks[rank].agree((3, rank))

    on_all(2, differ)
    assert [api.calls for api in devices.apis] == before
    devices.part()


@pytest.mark.parametrize("can_abort", [True, False])
def test_they_part_and_meet_again(can_abort) -> None:
    devices = Devices(2, can_abort)
    with pytest.raises(EngineError, match="have parted"):
        devices.ranks[0].gather(torch.ones(2))
    devices.meet("first")
    devices.part()
    devices.part()
    assert [api.calls.count("destroy_process_group") for api in devices.apis] == [1, 1]
    with pytest.raises(EngineError, match="have parted"):
        devices.ranks[1].begin_sum(torch.ones(2))
    devices.meet("second")
    devices.meet("third")
    found = on_all(2, lambda rank: devices.ranks[rank].gather(torch.full((1,), float(rank))))
    assert [one.flatten().tolist() for one in found] == [[0, 1], [0, 1]]
    devices.part()


def test_who_waits_for_a_rank_that_left_is_freed() -> None:
    devices = Devices(2)
    devices.meet("first")

    def work(rank: int) -> None:
        if rank == 1:
            devices.ranks[1].leave()
            return
        pending = devices.ranks[0].begin_sum(torch.ones(3))
        with pytest.raises(EngineError, match=r"failed: NCCL communicator was aborted$"):
            # The abort may have come before: then this rank leaves, as a step that fails does.
            devices.ranks[0].leave()
            pending.wait()

    began = time.monotonic()
    on_all(2, work)
    assert time.monotonic() - began < 60


def test_devices_that_cannot_meet() -> None:
    devices = Devices(2)
    for api in devices.apis:
        api.refusal = "Duplicate GPU detected\nmore"
    boards = wired_boards(2)

    def work(rank: int) -> None:
        with pytest.raises(EngineError, match=r"devices could not meet: Duplicate GPU detected$"):
            devices.ranks[rank].join(boards[rank])
        with pytest.raises(EngineError, match="have parted"):
            devices.ranks[rank].agree((1,))

    on_all(2, work)


def test_devices_that_cannot_part_free_their_hosts_all_the_same() -> None:
    devices = Devices(2)
    devices.meet("first")
    for api in devices.apis:
        api.refusal = "device lost"

    def work(rank: int) -> None:
        with pytest.raises(EngineError, match=r"could not part: device lost"):
            devices.ranks[rank].leave()
        with pytest.raises(EngineError, match="have parted"):
            devices.ranks[rank].agree((1,))
        devices.ranks[rank].leave()

    on_all(2, work)


def test_a_torch_without_the_back_end_is_refused() -> None:
    api = FakeDistributed(FakeCluster(2))
    api.available = False
    hosts = GlooRanks(0, 2, "127.0.0.1", 1.0, lambda: None)
    with pytest.raises(DependencyError, match="ranks on cuda need a torch with nccl"):
        DeviceRanks(hosts, Accelerator(), 1.0, api)


def test_the_hosts_address_is_checked_before_the_devices_meet() -> None:
    api = FakeDistributed(FakeCluster(2))
    ranks = DeviceRanks(GlooRanks(0, 2, "0.0.0.0", 1.0, lambda: None), Accelerator(), 1.0, api)
    with pytest.raises(ConfigError, match="collective_host"):
        ranks.join(wired_boards(2)[0])
    assert "init_process_group" not in api.calls


REAL = """
import types
import torch
import torch.distributed as dist
from tests.worker.collectives.test_device_ranks import Accelerator
from xllm.worker.collectives.device_ranks import DeviceRanks
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.rank_board import RankBoard
class Gloo(Accelerator):
    collectives = "gloo"
class OnHosts(types.SimpleNamespace):
    # A host is no device to bind a group to.
    group = dist.group
    def init_process_group(self, *args, device_id, **kwargs):
        dist.init_process_group(*args, **kwargs)
    def __getattr__(self, name):
        return getattr(dist, name)
hosts = GlooRanks(0, 1, "127.0.0.1", 9.0, lambda: None)
ranks = DeviceRanks(hosts, Gloo(), 9.0, OnHosts())
for name in ("first", "second"):
    board = RankBoard(name)
    board.open(lambda key, value: None)
    ranks.join(board)
    print(ranks.begin_sum(torch.ones(2)).wait().tolist(), ranks.gather(torch.ones(1)).tolist())
ranks.leave()
"""


@pytest.mark.process
def test_the_real_torch_distributed_takes_the_calls() -> None:
    """One rank alone, its device's group made by gloo, twice: the default group of a process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REAL], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[1.0, 1.0] [[1.0]]"] * 2


def test_ranks_are_placed_once(monkeypatch) -> None:
    made = []

    class Counted(DeviceRanks):
        def __init__(self, hosts, platform, timeout_s) -> None:
            super().__init__(hosts, platform, timeout_s, FakeDistributed(FakeCluster(1)))
            made.append(platform.name)

    monkeypatch.setattr(placed, "DeviceRanks", Counted)
    ranks = PlacedRanks(GlooRanks(0, 1, "127.0.0.1", 9.0, lambda: None), 9.0)
    ranks.place(CpuPlatform())
    assert made == []
    for _ in range(2):  # a model that wakes is read again
        ranks.place(Accelerator())
    assert made == ["cuda"]
    assert (ranks.rank, ranks.size) == (0, 1)
    ranks.join(wired_boards(1)[0])
    ranks.agree((1,))
    assert ranks.gather(torch.ones(2)).tolist() == [[1, 1]]
    assert ranks.begin_sum(torch.ones(2)).wait().tolist() == [1, 1]
    ranks.leave()
    with pytest.raises(EngineError, match="have parted"):
        ranks.gather(torch.ones(2))
