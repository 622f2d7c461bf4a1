"""Commands of leaders: only those of the highest epoch heard of are carried out. Pure.

Invariants: after a command under an epoch, none under a lower one is. A command with no epoch (0)
is of no leader, and is taken only as long as no leader has spoken. An epoch out of range, which no
later leader could exceed (see epochs), is believed of the registry alone.
"""

from __future__ import annotations

from xllm.protocol.epochs import is_out_of_range
from xllm.protocol.instance import EpochRefused


class EpochGate:
    """The highest epoch of one instance's life."""

    def __init__(self) -> None:
        self.highest = 0

    def is_out_of_range(self, epoch: int) -> bool:
        """Whether the registry must name a leader of that epoch, or a higher one, before a command
        under it counts."""
        return is_out_of_range(epoch, self.highest)

    def named(self, epoch: int) -> None:
        """The registry names a leader of that epoch."""
        self.highest = max(self.highest, epoch)

    def refusal(self, epoch: int) -> EpochRefused | None:
        """None where a command under `epoch`, which is in range, is to be carried out; else the
        answer to it."""
        if epoch < self.highest:
            return EpochRefused(epoch, self.highest)
        self.highest = epoch
        return None
