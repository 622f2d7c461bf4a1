"""Commands of leaders: only those of the highest epoch heard of are carried out. Pure.

Invariant: after a command under an epoch, none under a lower one is. A command with no epoch (0) is
of no leader, and is taken only as long as no leader has spoken.
"""

from __future__ import annotations

from xllm.protocol.instance import EpochRefused


class EpochGate:
    """The highest epoch of one instance's life."""

    def __init__(self) -> None:
        self.highest = 0

    def refusal(self, epoch: int) -> EpochRefused | None:
        """None where a command under `epoch` is to be carried out; else the answer to it."""
        if epoch < self.highest:
            return EpochRefused(epoch, self.highest)
        self.highest = epoch
        return None
