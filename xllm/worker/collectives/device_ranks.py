"""The ranks of an instance on accelerators: NCCL or HCCL between devices, gloo between hosts.

Parts travel from device to device and are added up there in the order of the ranks, as on CPUs; the
host goes on meanwhile, and what is started behind a sum waits for it on the device. What the ranks
agree on before a step are numbers of the hosts and goes between these, so that nothing waits for a
device. Both are plain TCP, or the devices' own network, without authentication or encryption: it
must be one that only the instance's hosts are on.

A process has one group of devices at a time (torch.distributed's default one). A collective that a
lost rank leaves unfinished keeps the device busy until the group is left, which aborts it; where
torch's own watchdog is first, it ends the process, and the master takes the rank for lost.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from xllm.errors import DependencyError, EngineError
from xllm.worker.collectives.board_store import BoardStore
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.collectives.ranks import PendingSum
from xllm.worker.platform.platform import Platform
from xllm.worker.rank_board import RankBoard

_KEYS = "device/"
"""Before the names by which the devices meet on the board: the hosts' are on it, too."""


class DeviceRanks:
    """This rank's end of the group of devices. `hosts` connects the hosts; `api` is
    torch.distributed."""

    def __init__(
        self, hosts: GlooRanks, platform: Platform, timeout_s: float, api: Any = dist
    ) -> None:
        self.rank = hosts.rank
        self.size = hosts.size
        self._hosts = hosts
        self._kind = platform.collectives
        self._device = platform.device
        self._timeout_s = timeout_s
        self._api = api
        self._has_met = False
        if not api.is_backend_available(self._kind):
            raise DependencyError(
                f"ranks on {platform.name} need a torch with {self._kind}",
                param="master.num_workers",
            )

    def join(self, board: RankBoard) -> None:
        """Leave the groups there were and make new ones by way of a board. Errors as of
        GlooRanks.join."""
        self.leave()
        self._hosts.join(board)
        try:
            self._api.init_process_group(
                self._kind,
                store=BoardStore(board, self._timeout_s, _KEYS),
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=self._timeout_s),
                device_id=self._device,
            )
        except (RuntimeError, ValueError) as error:
            self._hosts.leave()
            raise EngineError(f"the ranks' devices could not meet: {_first_line(error)}") from error
        self._has_met = True

    def leave(self) -> None:
        """Abort what is under way, so that the device and the others are freed, and close the
        connections. EngineError where the devices' cannot be closed; the hosts' are, then, too."""
        try:
            if self._has_met:
                self._part()
        finally:
            self._hosts.leave()

    def _part(self) -> None:
        self._has_met = False
        try:
            self._api.group.WORLD.abort()
        except RuntimeError:
            pass  # a back-end that cannot abort: its group is let go below
        try:
            self._api.destroy_process_group()
        except RuntimeError as error:
            raise EngineError(f"the devices could not part: {_first_line(error)}") from error

    def agree(self, numbers: Sequence[int]) -> None:
        """See Ranks."""
        self._hosts.agree(numbers)

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        """See Ranks."""
        return _DeviceSum(*self._begin(part))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        work, parts = self._begin(part)
        _wait(work)
        return parts

    def _begin(self, part: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if not self._has_met:
            raise EngineError("the ranks of this instance have parted")
        part = part.contiguous()
        parts = torch.empty((self.size, *part.shape), dtype=part.dtype, device=part.device)
        try:
            work = self._api.all_gather_into_tensor(parts.view(-1), part.view(-1), async_op=True)
        except RuntimeError as error:
            raise EngineError(f"a collective failed: {_first_line(error)}") from error
        return work, parts


class _DeviceSum:
    __slots__ = ("_parts", "_work")

    def __init__(self, work: Any, parts: torch.Tensor) -> None:
        self._work = work
        self._parts = parts

    def wait(self) -> torch.Tensor:
        _wait(self._work)
        total = self._parts[0]
        for part in self._parts[1:]:
            total += part
        return total


def _wait(work: Any) -> None:
    """Let the current stream wait for a collective. Without a timeout the host does not."""
    try:
        work.wait()
    except RuntimeError as error:
        raise EngineError(f"a collective of the ranks failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
