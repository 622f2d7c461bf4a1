"""Who leads, as far as this router knows: from the registry's key, and from what routers say. Pure.

Invariants: `epoch` only grows. What is said under a lower one is counted and changes nothing. Nor
does an epoch out of range, which no claim could exceed (see epochs): routers and instances may name
one up to MAX_BASE; above it only the registry's word raises `epoch`.
"""

from __future__ import annotations

import dataclasses

from xllm.protocol.bus import RouterPresence
from xllm.protocol.epochs import is_out_of_range


@dataclasses.dataclass(frozen=True, slots=True)
class Remembered:
    """What operators wrote through leaders, as a leader last found it in a registry of that era."""

    era: str = ""
    """"": nothing is remembered."""
    roles: tuple[tuple[str, str], ...] = ()
    ttft_ms: int = 0
    tpot_ms: int = 0

    def is_lost(self, era: str) -> bool:
        """Whether a registry of that era has forgotten it: what is missing there nobody deleted."""
        return bool(self.era) and self.era != era


class Standing:
    """The cluster's leader, seen from one router."""

    def __init__(self) -> None:
        self.leader = ""
        """Its name; "": none is known."""
        self.address = ""
        """Its ZeroMQ endpoint, where the registry told it."""
        self._named = ("", 0, "")
        """Leader, epoch and address as the registry's key last named them."""
        self.epoch = 0
        """The highest one heard of, of a leader that may be gone."""
        self.roles: tuple[tuple[str, str], ...] = ()
        """The leader's table, (instance, role), as it last said."""
        self.remembered = Remembered()
        """For a registry that has lost it."""
        self.num_stale = 0
        """Words of replaced leaders that were ignored."""
        self.num_out_of_range = 0
        """Epochs that were ignored."""

    def describe(self) -> str:
        """Who leads, for one who asked a router that does not."""
        if not self.leader:
            return "nobody is known to: ask again"
        if not self.address:
            return f"{self.leader} does, at an address that is not known yet: ask again"
        return f"{self.leader} at {self.address} does: ask there"

    def elected(self, leader: str, epoch: int, address: str) -> None:
        """The registry's key names a leader."""
        if epoch >= self.epoch:
            self.leader, self.epoch, self.address = self._named = leader, epoch, address

    def is_out_of_range(self, epoch: int) -> bool:
        """Whether nobody is believed to have heard of that epoch."""
        return is_out_of_range(epoch, self.epoch)

    def learned(self, epoch: int) -> bool:
        """Somebody has heard of that epoch: who leads under a lower one does not lead. False: it is
        out of range, and ignored."""
        if self.is_out_of_range(epoch):
            self.num_out_of_range += 1
            return False
        if epoch > self.epoch:
            self.epoch = epoch
            self.vacant()
        return True

    def vacant(self) -> None:
        """The registry's key is gone."""
        self.leader = self.address = ""

    def heard(self, word: RouterPresence) -> bool:
        """A router speaks: whether to believe what it says of its leadership."""
        self.learned(word.highest_epoch)
        if not self.learned(word.leader_epoch):
            return False
        if not word.leader_epoch:
            if word.publisher == self.leader:
                self.vacant()  # it stepped down, or is about to lead; the registry may know more
            return True
        if word.leader_epoch < self.epoch:
            self.num_stale += 1
            return False
        if word.publisher != self.leader:
            is_named = self._named[:2] == (word.publisher, word.leader_epoch)
            self.address = self._named[2] if is_named else ""
        self.leader, self.roles = word.publisher, word.roles
        if word.era:
            self.remembered = Remembered(word.era, word.roles, word.ttft_ms, word.tpot_ms)
        return True
