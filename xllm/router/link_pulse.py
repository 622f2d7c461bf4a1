"""Asks instances whether they hear this router, and tells the view: the shell of `hearing`.

A heartbeat proves one direction of one connection; requests take another one, the other way.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.protocol.instance import InstancePong, PingInstance
from xllm.protocol.records import InstanceRecord
from xllm.router.hearing import Hearing
from xllm.router.membership import Membership, MembershipListener
from xllm.router.view import ClusterView


class LinkPulse(MembershipListener):
    """Lives in the router's loop: `beat` once a period of heartbeats, `tick` more often."""

    def __init__(
        self,
        membership: Membership,
        view: ClusterView,
        period_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._membership = membership
        self._view = view
        self._clock = clock
        self._hearing = Hearing(period_s)
        self._number = 0
        membership.listeners.append(self)
        membership.answers(InstancePong, self._answered)

    def instance_registered(self, record: InstanceRecord) -> None:
        """See MembershipListener."""
        self._hearing.forget(record.name)

    def instance_connected(self, name: str) -> None:
        """See MembershipListener."""
        self._hearing.connected(name)
        self._ask(name)

    def instance_gone(self, name: str) -> None:
        """See MembershipListener."""
        self._hearing.forget(name)

    def beat(self) -> None:
        """Ask them."""
        for name in self._hearing.to_ask:
            self._ask(name)

    def tick(self) -> None:
        """Tell the view who became deaf, and connect anew to who stays so."""
        now = self._clock()
        for name in self._hearing.tick(now):
            self._membership.changed(self._view.deaf(name))
        for name in self._hearing.hopeless(now):
            self._hearing.gone(name)
            self._membership.reconnect(name)

    def _ask(self, name: str) -> None:
        self._number += 1
        if self._membership.send(name, PingInstance(self._number)):
            self._hearing.asked(name, self._clock())

    def _answered(self, name: str, word: InstancePong) -> None:
        if self._hearing.answered(name):
            self._membership.changed(self._view.hears(name))
