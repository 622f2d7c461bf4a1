"""What this router sent to instances, and other routers have there, between heartbeats.

Pure: told what happens and when, it keeps the view's numbers of instances true until their next
heartbeat. A word that was under way when a heartbeat was made is not in it: what was sent within
UNDER_WAY_S of its coming counts as unseen for one period more, which errs towards being busy.
"""

from __future__ import annotations

from collections import deque

from xllm.protocol.bus import InstanceHeartbeat, RouterPresence
from xllm.router.process_views import InstanceView
from xllm.router.view import ClusterView

UNDER_WAY_S = 0.02
PRESENCE_S = 1.0
"""A router silent for so long is not believed to have requests anywhere."""


class Traffic:
    """Of one router; `view` gets the numbers."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._sent: dict[str, deque[tuple[float, int]]] = {}
        """By instance: when, and how many prompt tokens to compute, since its last heartbeat."""
        self._elsewhere: dict[str, tuple[float, dict[str, int]]] = {}
        """By other router: when it spoke, and its requests by instance."""

    def placed(self, name: str, num_tokens: int, now: float) -> None:
        """A request with so many prompt tokens to compute was sent there."""
        one = self._view.get(name)
        if one is None:
            return
        one.num_inflight += 1
        one.unseen_tokens += num_tokens
        sent = self._sent.get(name)
        if sent is None:
            sent = self._sent[name] = deque()
        sent.append((now, num_tokens))

    def left(self, name: str) -> None:
        """A request of this router ended there or was moved away."""
        one = self._view.get(name)
        if one is not None and one.num_inflight:
            one.num_inflight -= 1

    def refused(self, name: str) -> None:
        """An instance refused a request, which is still counted, for its queue is full: believed
        until it speaks, or one of the others there ends."""
        one = self._view.get(name)
        if one is not None:
            one.full_from = max(0, one.num_inflight - 1)

    def heartbeat(self, word: InstanceHeartbeat, now: float) -> None:
        """An instance spoke, and the view has heard it."""
        name = word.publisher
        one = self._view.get(name)
        if one is None or one.record.incarnation != word.incarnation:
            return
        sent = self._sent.get(name)
        num_under_way = 0
        one.unseen_tokens = 0
        if sent:
            while sent and sent[0][0] < now - UNDER_WAY_S:
                sent.popleft()
            num_under_way = len(sent)
            one.unseen_tokens = sum(num_tokens for _, num_tokens in sent)
        one.inflight_then = max(0, one.num_inflight - num_under_way)
        one.full_from = -1
        one.num_elsewhere = self._count_elsewhere(one, now)

    def presence(self, word: RouterPresence, now: float) -> None:
        """Another router spoke."""
        self._elsewhere[word.publisher] = (now, dict(word.inflight))
        for name, _ in word.inflight:
            one = self._view.get(name)
            if one is not None:
                one.num_elsewhere = self._count_elsewhere(one, now)

    def forget(self, now: float) -> None:
        """Call now and then: drop what is of routers and instances that are gone."""
        for router, (heard_at, _) in list(self._elsewhere.items()):
            if heard_at < now - PRESENCE_S:
                del self._elsewhere[router]
        for name in [name for name in self._sent if self._view.get(name) is None]:
            del self._sent[name]

    def _count_elsewhere(self, one: InstanceView, now: float) -> int:
        oldest = now - PRESENCE_S
        return sum(
            counts.get(one.name, 0)
            for heard_at, counts in self._elsewhere.values()
            if heard_at >= oldest
        )
