"""Who holds a name in the registry, and what another process of that name may do about it.

A record says which process wrote it: the boot of its machine, its namespaces of ids and of time,
its id and when it was started there. A reader in the same namespaces knows for certain whether that
process has ended; any other one has to see its lease end. `NameClaim` decides, without I/O;
`own_process` and `has_ended` read /proc (proc(5), pid_namespaces(7), time_namespaces(7)).
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable

from xllm.errors import BadMessageError
from xllm.protocol.codec import Decoder
from xllm.protocol.message import MapPart
from xllm.protocol.registry.interface import MIN_TTL_S
from xllm.protocol.registry_wire import Entry

_APART_S = 2.0
"""Looks whose answers came further apart than this say nothing of the time between them: the
registry may have been away, so that no lease could be renewed, and none could end. A shorter
absence is part of the patience."""
_ENDED = (b"Z", b"X")
"""States of a process that runs no more: it waits for its parent, or is being removed."""


class Holder(MapPart, frozen=True):
    """What all records say of who wrote them; "" where one does not."""

    incarnation: str = ""
    process: str = ""


class NameState(enum.Enum):
    """Of a name, for one who wants it."""

    FREE = "free"
    """Its key may be written: there is none, it is ours, or its owner has ended."""
    HELD = "held"
    """Another process has it, which may have ended; its lease will tell."""
    TAKEN = "taken"
    """Another living process has it."""


class NameClaim:
    """One incarnation's claim to one key. Invariant: a key whose owner may live is not FREE, and
    one that stands for longer than two leases and two seconds in which the registry answered all
    the time is TAKEN: who ended does not renew, and an etcd whose leader changed gives every lease
    its whole time once more. All processes of a cluster have leases of the same length.
    `drain_s`: so long one that was told to end may renew on; its follower waits for it, too."""

    def __init__(
        self,
        incarnation: str,
        ttl_s: float,
        ended: Callable[[str], bool] | None = None,
        *,
        drain_s: float = 0.0,
    ) -> None:
        self._incarnation = incarnation
        self._ended = has_ended if ended is None else ended
        self._decoder: Decoder[Holder] = Decoder(Holder)
        self._lease_s = math.ceil(max(ttl_s, MIN_TTL_S))
        """As etcd grants it, in whole seconds."""
        self._drain_s = drain_s
        self._rival: tuple[int, float] | None = None
        """Lease of the other one, and since when it was seen again and again."""
        self._told_at = 0.0

    def granted(self, ttl_s: float) -> None:
        """The registry gave a lease this long, which may be longer than was asked for."""
        self._lease_s = max(self._lease_s, math.ceil(ttl_s))

    def unanswered(self) -> None:
        """A look failed: no lease can be renewed while the registry is away, and what stood before
        may stand for a whole lease after it came back."""
        self._rival = None

    def judge(
        self, entry: Entry | None, lease_id: int, asked_at: float, told_at: float
    ) -> NameState:
        """How the name stands, by what its key held between these times. `lease_id`: ours, or 0."""
        is_apart, self._told_at = told_at - self._told_at > _APART_S, told_at
        if entry is None or self._may_write(entry, lease_id):
            self._rival = None
            return NameState.FREE
        if self._rival is None or self._rival[0] != entry.lease_id or is_apart:
            self._rival = (entry.lease_id, told_at)
        waited_s = asked_at - self._rival[1]
        patience_s = 2 * self._lease_s + _APART_S + self._drain_s
        return NameState.TAKEN if waited_s > patience_s else NameState.HELD

    def describe_holder(self, entry: Entry) -> str:
        """Who wrote an entry, for people."""
        holder = self._holder(entry)
        who = describe_process(holder.process)
        return f"{who} (incarnation {holder.incarnation[:32] or 'unknown'}, lease {entry.lease_id})"

    def _may_write(self, entry: Entry, lease_id: int) -> bool:
        if lease_id and entry.lease_id == lease_id:
            return True
        holder = self._holder(entry)
        is_ours = bool(self._incarnation) and holder.incarnation == self._incarnation
        return is_ours or self._ended(holder.process)

    def _holder(self, entry: Entry) -> Holder:
        try:
            return self._decoder.decode(entry.value)
        except BadMessageError:
            return Holder()  # its key says that there is somebody, and nothing more


def own_process() -> str:
    """This process as its record says it: boot, namespaces, id, start. "" where the machine does
    not tell."""
    place, start = _own_place(), _start_of(os.getpid())
    return f"{place}/{os.getpid()}/{start}" if place and start else ""


def has_ended(process: str) -> bool:
    """Whether that process certainly runs no more. False where it cannot be told from here."""
    place, _, rest = process.rpartition("/")[0].rpartition("/")
    started = process.rpartition("/")[2]
    if not place or place != _own_place() or not rest.isdecimal():
        return False
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # another user's, of whom /proc may still say more
    start = _start_of(int(rest))
    return start == "ended" or bool(start and start != started)


def describe_process(process: str) -> str:
    """`process 17 of this machine`, or `a process elsewhere` where that is not known."""
    place, _, pid = process.rpartition("/")[0].rpartition("/")
    is_here = place and place == _own_place()
    return f"process {pid} of this machine" if is_here else "a process elsewhere"


def _own_place() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        # A start time counts from the boot as the reader's time namespace has it.
        spaces = (os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time"))
        return f"{boot}/{'/'.join(spaces)}" if boot else ""
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process was started, in ticks since the boot; `ended` of one that only waits to be
    removed, "" where that cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except OSError:
        return ""
    # The name in parentheses may hold anything; the state follows the last of them.
    fields = line[line.rfind(b")") + 1 :].split()
    if len(fields) < 20:
        return ""
    return "ended" if fields[0] in _ENDED else fields[19].decode()
