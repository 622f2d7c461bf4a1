"""What the router knows of the cluster: instances and daemons, from records and heartbeats.

Pure: told what happened and when, it says which instances became usable and which were lost. An
instance is usable once it is registered, while it is connected, heard of under that incarnation
within three heartbeat periods, hears this router (`hearing`), and says that it is ready: the
registry says who there is, never who is well. Three silent periods make it suspect, and so does
its deafness; suspicion is enough to move its requests to another: their words carry attempts, so
being wrong costs time and nothing else. An instance that is registered and was not heard of yet is
expected, for a while; one that was heard of and is gone without having said that it leaves is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec

from xllm.errors import InvariantError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import DaemonHeartbeat, InstanceHeartbeat, RouterPresence
from xllm.protocol.records import InstanceRecord
from xllm.router.leadership.standing import Standing
from xllm.router.lost_instances import LostInstance, LostInstances
from xllm.router.process_views import DaemonView, InstanceView, RouterView

MISSED_HEARTBEATS = 3
EXCUSED_S = 1.0
"""After a pause of this process the loss of a connection tells nothing of the other side."""


@dataclasses.dataclass(frozen=True, slots=True)
class ViewChange:
    """What an event changed: names of instances that can take requests now, of those whose
    requests are lost there (those of them that left, or that this process lost by a pause of its
    own, are in `left`, too: they did not die of their work), and of those that fell silent (theirs
    move if there is a better place)."""

    ready: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    suspect: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


_UNCHANGED = ViewChange()


class ClusterView:
    """All instances and daemons. `period_s`: of heartbeats."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self.silence_s = MISSED_HEARTBEATS * period_s
        """Who says nothing for so long is suspect."""
        self._instances: dict[str, InstanceView] = {}
        self._daemons: dict[str, DaemonView] = {}
        self._routers: dict[str, RouterView] = {}
        self.lost = LostInstances()
        """Those that should be here."""
        self.standing = Standing()
        """Who leads."""
        self._ticked_at = 0.0
        self._resumed_at = 0.0
        """When the last pause of this process ended: nobody counts as silent since before."""
        self._excused_until = 0.0
        self._usable: dict[str, tuple[InstanceView, ...]] = {}
        """By model; made anew after each change."""

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._instances.values())

    def get(self, name: str) -> InstanceView | None:
        """The instance of that name, if it is registered."""
        return self._instances.get(name)

    def usable(self, model: str) -> tuple[InstanceView, ...]:
        """Instances of a model that can take requests, in a stable order."""
        found = self._usable.get(model)
        if found is None:
            found = tuple(
                one for one in self._instances.values() if one.usable and one.record.model == model
            )
            self._usable[model] = found
        return found

    @property
    def daemons(self) -> dict[str, DaemonView]:
        """KV cache daemons by name."""
        return self._daemons

    @property
    def routers(self) -> dict[str, RouterView]:
        """Other routers by name."""
        return self._routers

    # -- events ------------------------------------------------------------------------------

    def registered(self, record: InstanceRecord, now: float) -> ViewChange:
        """A record was written. Another incarnation replaces the instance: what ran is lost."""
        self.lost.came_back(record.name)
        old = self._instances.get(record.name)
        if old is not None and old.record.incarnation == record.incarnation:
            was = old.usable
            old.record = record
            old.leaving = old.replaced = False
            return self._changed(old, was)
        fresh = InstanceView(record, heard_at=now, listed_at=now)
        self._instances[record.name] = fresh
        self._usable.clear()
        return ViewChange(lost=(record.name,)) if old is not None else _UNCHANGED

    def deregistered(self, name: str, *, replaced: bool = False) -> ViewChange:
        """A record is gone: the instance drains, or its lease ended while it lives on. Which of
        them, it says itself; it is lost only once the connection or its heartbeats are.
        `replaced`: under its name a process is registered that cannot be used here."""
        if replaced:
            self.lost.came_back(name)
        one = self._instances.get(name)
        if one is None:
            return _UNCHANGED
        self._usable.clear()
        one.replaced = one.replaced or replaced
        if one.connected and not one.suspect:
            one.leaving = True
            return _UNCHANGED
        self._remove(one)
        return ViewChange(lost=(name,))

    def connected(self, name: str) -> ViewChange:
        """The connection to an instance stands."""
        one = self._instances.get(name)
        if one is None:
            return _UNCHANGED
        was = one.usable
        one.connected = True
        one.deaf = False
        if one.seq:
            one.expected = False
        return self._changed(one, was)

    def disconnected(self, name: str) -> ViewChange:
        """The connection is lost: it is not used until it is heard of again."""
        one = self._instances.get(name)
        if one is None:
            return _UNCHANGED
        # Who was paused was cut off by the others, none of whom died of it.
        lives = (one.leaving and one.state != "ready") or self._ticked_at < self._excused_until
        one.connected = False
        one.expected = False
        one.state = "unknown"
        self._forget_leaving(one)
        return ViewChange(lost=(name,), left=(name,) if lives else ())

    def heartbeat(self, word: InstanceHeartbeat, now: float) -> ViewChange:
        """An instance speaks. Words of other incarnations than the registered one are ignored."""
        one = self._instances.get(word.publisher)
        if one is None or one.record.incarnation != word.incarnation:
            return _UNCHANGED
        if word.seq <= one.seq:
            return _UNCHANGED  # a word of the past
        was = one.usable
        if one.seq and word.seq != one.seq + 1:
            one.num_gaps += 1
        failed_now = word.state == "failed" and one.state != "failed"
        one.seq = word.seq
        one.heard_at = now
        one.state = word.state
        one.draining = word.state == "draining"
        one.role = word.role
        one.load = word.load
        one.workers = word.workers
        one.silent = False
        if one.connected or one.state != "ready":
            one.expected = False
        if word.metrics:
            one.metrics = word.metrics
        if failed_now:
            self._usable.clear()
            return ViewChange(lost=(one.name,))
        return self._changed(one, was)

    def deaf(self, name: str) -> ViewChange:
        """A connected instance does not hear this router. One that leaves may say its last."""
        one = self._instances.get(name)
        if one is None or one.deaf or not one.connected:
            return _UNCHANGED
        if one.leaving and one.state != "ready":
            return _UNCHANGED
        one.deaf = True
        self._usable.clear()
        return ViewChange(suspect=(name,))

    def hears(self, name: str) -> ViewChange:
        """It hears this router again."""
        one = self._instances.get(name)
        if one is None:
            return _UNCHANGED
        was = one.usable
        one.deaf = False
        return self._changed(one, was)

    def refused(self, name: str) -> None:
        """An instance said that it takes no requests: believed until its next heartbeat."""
        one = self._instances.get(name)
        if one is not None:
            one.state = "refusing"
            self._usable.clear()

    def daemon_heartbeat(self, word: DaemonHeartbeat, now: float) -> None:
        """A KV cache daemon speaks. Its figures are not in each of its words."""
        known = self._daemons.get(word.publisher)
        if known is not None and not word.metrics:
            word = msgspec.structs.replace(word, metrics=known.heartbeat.metrics)
        self._daemons[word.publisher] = DaemonView(word, now)

    def router_presence(self, word: RouterPresence, now: float) -> bool:
        """Another router speaks; what a replaced leader says of its leadership is ignored. False: a
        word of the past."""
        known = self._routers.get(word.publisher)
        last = known.presence if known is not None else None
        if last is not None and last.incarnation == word.incarnation and word.seq <= last.seq:
            return False
        self.standing.heard(word)
        if last is not None and not word.metrics:
            word = msgspec.structs.replace(word, metrics=last.metrics)
        self._routers[word.publisher] = RouterView(word, now)
        return True

    def publisher_gone(self, role: PeerRole, name: str) -> None:
        """The record of a daemon or another router is gone."""
        if role is PeerRole.DAEMON:
            self._daemons.pop(name, None)
        else:
            self._routers.pop(name, None)

    def tick(self, now: float) -> ViewChange:
        """Call at least once a period: who was silent too long becomes suspect. After a pause of
        this process itself everybody gets a fresh start, for their words may still wait unread."""
        paused = self._ticked_at and now - self._ticked_at > self._period_s * 2
        self._ticked_at = now
        self.lost.forget_old(now)
        if paused:
            self._excused_until = now + EXCUSED_S
            self._resumed_at = now
        limit = now - self.silence_s
        if self._resumed_at and self._resumed_at >= limit:
            return _UNCHANGED
        silent = [
            one
            for one in self._instances.values()
            if one.seq and not one.silent and one.heard_at < limit
        ]
        if not silent:
            return _UNCHANGED
        for one in silent:
            one.silent = True
            self._forget_leaving(one)
        left = tuple(one.name for one in silent if one.leaving)
        return ViewChange(
            lost=left,
            left=left,
            suspect=tuple(one.name for one in silent if not one.leaving),
        )

    def _forget_leaving(self, one: InstanceView) -> None:
        self._usable.clear()
        if one.leaving:
            self._remove(one)

    def _remove(self, one: InstanceView) -> None:
        del self._instances[one.name]
        if one.seq and not one.draining and not one.replaced:
            record = one.record
            self.lost.add(
                LostInstance(one.name, record.incarnation, record.model, one.role, one.heard_at)
            )

    def _changed(self, one: InstanceView, was: bool) -> ViewChange:
        if one.usable == was:
            return _UNCHANGED
        self._usable.clear()
        return ViewChange(ready=(one.name,)) if one.usable else _UNCHANGED

    def check(self) -> None:
        """InvariantError if the state cannot be."""
        for model, cached in self._usable.items():
            for one in cached:
                if not one.usable or self._instances.get(one.name) is not one:
                    raise InvariantError(f"{one.name} is listed as usable for {model}")
        for lost in self.lost:
            if lost.name in self._instances:
                raise InvariantError(f"{lost.name} is listed as lost, and is registered")
        self.lost.check()
