"""An instance's ranks wherever they compute: known from the start, their devices once a model is
read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xllm.worker.collectives.device_ranks import DeviceRanks
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.collectives.ranks import PendingSum
from xllm.worker.platform.platform import Platform
from xllm.worker.rank_board import RankBoard


class PlacedRanks:
    """This rank's end: `hosts` alone on CPUs, with the devices' own connections elsewhere."""

    def __init__(self, hosts: GlooRanks, timeout_s: float) -> None:
        self.rank = hosts.rank
        self.size = hosts.size
        self._hosts = hosts
        self._timeout_s = timeout_s
        self._ranks: GlooRanks | DeviceRanks = hosts

    def place(self, platform: Platform) -> None:
        """Compute on a platform from now on; once, before they meet. DependencyError where its
        devices cannot be connected."""
        if platform.collectives != "gloo" and self._ranks is self._hosts:
            self._ranks = DeviceRanks(self._hosts, platform, self._timeout_s)

    def join(self, board: RankBoard) -> None:
        """Leave the group there was and make a new one by way of a board. EngineError where the
        other ranks do not come, ConfigError where the host's address cannot be bound."""
        self._ranks.join(board)

    def leave(self) -> None:
        """Close the connections, so that ranks which wait for this one are freed."""
        self._ranks.leave()

    def agree(self, numbers: Sequence[int]) -> None:
        """See Ranks."""
        self._ranks.agree(numbers)

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        """See Ranks."""
        return self._ranks.begin_sum(part)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See Ranks."""
        return self._ranks.gather(part)
