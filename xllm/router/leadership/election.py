"""Who leads: one router's part in the election. Pure: told what was answered, seen and what time
it is, it says which one call to make of the registry.

The leader is who created the cluster's leader key, under a lease of its own; the revision of that
creation tells its epoch (see epochs). Invariant: `leads(now)` is only said while the lease cannot
have ended yet, by the clock of this process alone: a lease lives at least its time to live from
when its last confirmed renewal was *sent*, less a margin for clocks that run differently. So no
two routers say it at one time, whatever was lost, late or paused; a call on its way is what epochs
are for.

After section 3 of Gray and Cheriton, "Leases" (1989), and Chubby's sequencers (Burrows, 2006).
"""

from __future__ import annotations

import dataclasses
import enum

from xllm.protocol.epochs import raised_base
from xllm.protocol.registry_wire import CasResult, Entry, Lease

RENEWALS_A_LEASE = 4
"""Renewals are sent this often in a lease's time; as long, and at most MAX_TIMEOUT_S, is waited
for an answer."""
MAX_TIMEOUT_S = 1.0
AGAIN_S = 0.25
"""Pause after a call that was not answered."""
_MARGIN_SHARE = 0.1
_MARGIN_S = 0.1


def margin_s(ttl_s: float) -> float:
    """How long before its lease can end a leader stops: a tenth of it for clocks that run
    differently, and a tenth of a second for what it was just doing."""
    return ttl_s * _MARGIN_SHARE + _MARGIN_S


class Step(enum.Enum):
    """What to ask of the registry."""

    GRANT = "grant"
    CLAIM = "claim"
    """compare_and_set of the leader key, expected not to exist."""
    RENEW = "renew"
    REVOKE = "revoke"


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call to make, and within which time its answer counts. `lease_id`: 0 for a grant."""

    number: int
    step: Step
    lease_id: int
    timeout_s: float


class Election:
    """One candidate. After each event, make the call that `next_call` gives, if any; ask again at
    `wake_at` at the latest. `None` as an answer: it did not come, or was an error."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._numbers = 0
        self._pending: Call | None = None
        self._sent_at = 0.0
        self._lease_id = 0
        self._deadline = 0.0
        self._renew_at = 0.0
        self._retry_at = 0.0
        self._epoch = 0
        self._revision = 0
        self._highest = 0
        """The highest epoch heard of, or had."""
        self._before_claim = 0
        """The highest epoch heard of before the claim was sent, or that another leads under."""
        self._gives_way = False
        self._entry: Entry | None = None
        self._claimed_at = 0
        self._abandoned: set[int] = set()
        self._resigned = False

    # -- questions ---------------------------------------------------------------------------

    def leads(self, now: float) -> bool:
        """Whether this process leads, for certain. Ask before each act of a leader."""
        return self._epoch != 0 and now < self._deadline

    @property
    def epoch(self) -> int:
        """The epoch under which this process leads (or led, until it noticed); else 0."""
        return self._epoch

    @property
    def revision(self) -> int:
        """That created the own leader key. Meaningless without an epoch."""
        return self._revision

    def needed_base(self, base: int, revision: int) -> int:
        """What the epoch base must be for the claim on its way, which was done at that revision."""
        return base if self._is_above(base + revision) else raised_base(self._highest)

    @property
    def entry(self) -> Entry | None:
        """The leader key as last heard of, whoever wrote it."""
        return self._entry

    @property
    def deadline(self) -> float:
        """When leadership ends unless a renewal is confirmed. Meaningless without an epoch."""
        return self._deadline

    @property
    def has_released(self) -> bool:
        """Whether no lease of this process stands any more, as far as it knows."""
        return not self._abandoned and not self._lease_id and self._pending is None

    def wake_at(self, now: float) -> float | None:
        """When `next_call`, which has just been asked, may have more to say though nothing
        happened meanwhile."""
        times = []
        if self._epoch:
            times.append(self._deadline)
        if self._pending is None:
            times.append(self._renew_at if self._epoch else self._retry_at)
        return min((time for time in times if time > now), default=None)

    # -- events ------------------------------------------------------------------------------

    def seen(self, entry: Entry | None, revision: int) -> None:
        """The watch tells the leader key (None: there is none) as of that revision. Its news are in
        order, but may be older than an answer: those of before the own claim end no leadership."""
        if self._epoch and revision <= self._claimed_at:
            return
        self._entry = entry
        if self._epoch and not self._is_own(entry):
            self._step_down()  # the lease ended in truth, or was ended

    def granted(self, call: Call, lease: Lease | None, now: float) -> None:
        """Answer to GRANT. A grant that was not answered may be one: it ends by itself."""
        if not self._settle(call):
            return
        if lease is None:
            self._retry_at = now + AGAIN_S
            return
        self._lease_id = lease.id
        self._confirmed(lease.ttl_s)

    def claimed(self, call: Call, result: CasResult | None, now: float, *, base: int = 0) -> None:
        """Answer to CLAIM, and the epoch base as read behind it. One that was not answered may
        have been done: the lease is given up, and the key with it."""
        if not self._settle(call):
            return
        if result is None:
            self._retry_at = now + AGAIN_S
            self._abandon()
            return
        self._entry = result.entry
        if not result.ok or result.entry is None or now >= self._deadline:
            self._abandon()
            return
        epoch = base + result.entry.create_revision
        if not self._is_above(epoch):  # a higher one was heard of since the base was read
            self._abandon()
            return
        self._epoch = self._highest = epoch
        self._revision = result.entry.create_revision
        self._claimed_at = result.entry.mod_revision

    def renewed(self, call: Call, ttl_s: float | None, now: float) -> None:
        """Answer to RENEW; 0: the lease is gone, and the key with it."""
        if not self._settle(call):
            return
        if ttl_s is None:
            self._renew_at = now + min(AGAIN_S, self._ttl_s / RENEWALS_A_LEASE)
        elif ttl_s <= 0:
            if self._is_own(self._entry):
                self._entry = None
            self._epoch = self._lease_id = 0
        else:
            self._confirmed(ttl_s)

    def revoked(self, call: Call, done: bool, now: float) -> None:
        """Answer to REVOKE. One that was not answered is tried again while its key stands."""
        self._settle(call)
        if done:
            self._abandoned.discard(call.lease_id)
            if self._entry is not None and self._entry.lease_id == call.lease_id:
                self._entry = None
            if self._gives_way:
                self._gives_way, self._retry_at = False, now + AGAIN_S
        else:
            self._retry_at = now + AGAIN_S

    def outbid(self, epoch: int) -> None:
        """Somebody heard of that epoch: a leader of a lower one is none. It lets others go first,
        who have been there for longer."""
        self._highest = max(self._highest, epoch)
        if 0 < self._epoch < epoch:
            self._give_way()

    def led(self, epoch: int) -> None:
        """Another says that it leads under that epoch: so it is not the echo of an own claim. A
        registry that lost its data may give its revision out again."""
        self._before_claim = max(self._before_claim, epoch)
        self.outbid(epoch)
        if self._epoch == epoch:
            self._give_way()

    def disproved(self) -> None:
        """The registry has another leader, or none."""
        self._step_down()

    def resign(self) -> None:
        """Lead no more and take no part from now on; the lease is given up, so that another can
        lead at once."""
        self._resigned = True
        self._step_down()

    # -- what to do --------------------------------------------------------------------------

    def next_call(self, now: float) -> Call | None:
        """The call to make now, if any; there is never more than one that counts."""
        if self._epoch and now >= self._deadline:
            self._step_down()
        if self._pending is not None:
            return None
        if self._epoch:
            if now < self._renew_at:
                return None
            return self._ask(Step.RENEW, self._lease_id, now)
        if now < self._retry_at:
            return None
        if self._lease_id:
            if self._entry is None and now < self._deadline and not self._resigned:
                return self._ask(Step.CLAIM, self._lease_id, now)
            self._abandon()
        if self._abandoned:
            return self._ask(Step.REVOKE, min(self._abandoned), now)
        if self._entry is None and not self._resigned:
            return self._ask(Step.GRANT, 0, now)
        return None

    def _ask(self, step: Step, lease_id: int, now: float) -> Call:
        if step is Step.CLAIM:
            self._before_claim = self._highest
        self._numbers += 1
        self._sent_at = now
        timeout_s = min(self._ttl_s / RENEWALS_A_LEASE, MAX_TIMEOUT_S)
        self._pending = Call(self._numbers, step, lease_id, timeout_s)
        return self._pending

    def _settle(self, call: Call) -> bool:
        """Whether this is the answer that is waited for."""
        if self._pending is not call:
            return False
        self._pending = None
        return True

    def _confirmed(self, ttl_s: float) -> None:
        """The lease stood at some time after `_sent_at`, with its full time before it."""
        self._deadline = self._sent_at + ttl_s - margin_s(ttl_s)
        self._renew_at = self._sent_at + ttl_s / RENEWALS_A_LEASE

    def _is_above(self, epoch: int) -> bool:
        """Whether the claim on its way may lead under that epoch. Whoever sees the key tells of its
        epoch, to this process, too, before the claim is answered: one that was heard of since the
        claim was sent and is the same is the claim's own, unless another leads under it."""
        return epoch > self._before_claim and epoch >= self._highest

    def _is_own(self, entry: Entry | None) -> bool:
        """A registry that lost its data may give a revision out again, but no lease's id."""
        ours = self._revision, self._lease_id
        return entry is not None and (entry.create_revision, entry.lease_id) == ours

    def _give_way(self) -> None:
        self._step_down()
        self._gives_way = True

    def _step_down(self) -> None:
        self._epoch = 0
        self._abandon()

    def _abandon(self) -> None:
        """The lease is of no use: what is asked about it does not count any more."""
        if self._lease_id:
            self._abandoned.add(self._lease_id)
            self._lease_id = 0
            self._pending = None
