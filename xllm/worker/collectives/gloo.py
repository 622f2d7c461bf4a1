"""The ranks of an instance on CPUs, connected by gloo (torch.distributed).

The connections are plain TCP between the hosts' `worker.collective_host`, without authentication
or encryption: gloo has none. A group lives until a collective of it fails; the ranks then meet
anew. Parts are exchanged as they are and added up here, in the order of the ranks: with two ranks
that moves as many bytes as a ring would, in one exchange instead of two.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from xllm.errors import ConfigError, DependencyError, EngineError
from xllm.worker.collectives.board_store import BoardStore
from xllm.worker.collectives.ranks import PendingSum
from xllm.worker.rank_board import RankBoard

_NO_ADDRESS = ("", "*", "0.0.0.0", "::")
_LOOK = datetime.timedelta(seconds=0.1)
"""A rank that waits for others says so often: it is not frozen."""


class GlooRanks:
    """This rank's end of the group. `tick` is called now and then while it waits."""

    def __init__(
        self, rank: int, size: int, host: str, timeout_s: float, tick: Callable[[], None]
    ) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise DependencyError(
                "ranks on CPUs need a torch with gloo", param="master.num_workers"
            )
        self.rank = rank
        self.size = size
        self._host = host
        self._timeout_s = timeout_s
        self._tick = tick
        self._group: Any = None
        # Works keep the connections open: they are kept here alone, where `leave` finds them.
        self._works: dict[int, dist.Work] = {}
        self._num_works = 0
        self._num_meetings = 0

    def join(self, board: RankBoard) -> None:
        """Leave the group there was and make a new one by way of a board. EngineError where the
        other ranks do not come, ConfigError where the host's address cannot be bound."""
        self.leave()
        if self._host in _NO_ADDRESS:
            raise ConfigError(
                f"worker.collective_host must be one address of this host, not {self._host!r}",
                param="worker.collective_host",
            )
        try:
            device = dist.ProcessGroupGloo.create_device(hostname=self._host)
        except RuntimeError as error:
            raise ConfigError(
                f"worker.collective_host {self._host!r} cannot be used: {_first_line(error)}",
                param="worker.collective_host",
            ) from error
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack half of it
        options = gloo._Options()
        options._devices = [device]
        options._timeout = datetime.timedelta(seconds=self._timeout_s)
        store = BoardStore(board, self._timeout_s)
        try:
            self._group = gloo(store, self.rank, self.size, options)
        except RuntimeError as error:
            raise EngineError(f"the ranks could not meet: {_first_line(error)}") from error
        self._num_meetings += 1

    def leave(self) -> None:
        """Close the connections, so that ranks which wait for this one are freed."""
        for number in tuple(self._works):
            try:
                self._finish(number)
            except EngineError:
                pass  # a collective that nobody asks for any more
        self._group = None

    def agree(self, numbers: Sequence[int]) -> None:
        """See Ranks."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        for rank, theirs in enumerate(self.gather(mine)):
            if not torch.equal(mine, theirs):
                raise EngineError(
                    f"rank {self.rank} is at {mine.tolist()}, rank {rank} at {theirs.tolist()}"
                )

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        """See Ranks."""
        return _GlooSum(self, *self._begin(part))

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        number, parts = self._begin(part)
        self._finish(number)
        return parts

    def _begin(self, part: torch.Tensor) -> tuple[int, torch.Tensor]:
        if self._group is None:
            raise EngineError("the ranks of this instance have parted")
        part = part.contiguous()
        parts = torch.empty((self.size, *part.shape), dtype=part.dtype)
        self._num_works += 1
        number = self._num_works
        try:
            self._works[number] = self._group._allgather_base(parts.view(-1), part.view(-1))
        except RuntimeError as error:
            raise EngineError(f"a collective failed: {_first_line(error)}") from error
        return number, parts

    def _finish(self, number: int) -> None:
        """Wait for a work, which ends within the group's timeout one way or another."""
        text = ""
        while True:
            try:
                self._works[number].wait(_LOOK)
            except RuntimeError as error:
                if not self._works[number].is_completed():
                    self._tick()
                    continue
                text = _first_line(error)
            break
        del self._works[number]
        if text:
            raise EngineError(f"a collective of the ranks failed: {text}")


class _GlooSum:
    __slots__ = ("_number", "_parts", "_ranks")

    def __init__(self, ranks: GlooRanks, number: int, parts: torch.Tensor) -> None:
        self._ranks = ranks
        self._number = number
        self._parts = parts

    def wait(self) -> torch.Tensor:
        self._ranks._finish(self._number)
        total = self._parts[0]
        for part in self._parts[1:]:
            total += part
        return total


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
