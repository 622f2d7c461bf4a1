"""Everything that runs or waits on an instance, and the ways in which it stops doing so.

The state that admission, planning and settling share. It decides how a sequence or a request
leaves; not who runs or what a step does. Invariants: an open request has at least one sequence
that waits, runs, is held, or stands for choices that will fork from it; a sequence's blocks are
released once no step in flight touches them, and not before; each request gets one terminal word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from xllm.kvcache.owners import OwnedMemory
from xllm.master.block_tables import BlockTables
from xllm.master.expert_load import ExpertLoad
from xllm.master.idleness import IdleMeter
from xllm.master.latency import LatencyMeter
from xllm.master.limits import InstanceLimits
from xllm.master.outcome import StepOutcome
from xllm.master.queue import DeadlineQueue
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence, SequencePhase
from xllm.master.strategies.policy import SchedulingPolicy
from xllm.protocol.step import StepPlan


@dataclasses.dataclass(slots=True)
class PendingFork:
    """A fork that the worker will learn with the next plan. `block_ids`: its table as of the fork
    (what it grows by until then comes with its item). `copy`: (source, destination) of its
    partial block, the source pinned until that plan is done; None where nothing is copied."""

    child: Sequence
    parent_number: int
    block_ids: tuple[int, ...]
    copy: tuple[int, int] | None


@dataclasses.dataclass(slots=True)
class StepInFlight:
    """A plan under way: the sequence of each of its items, forks that it introduces, and the
    blocks pinned for its copies."""

    plan: StepPlan
    sequences: list[Sequence]
    forked: list[Sequence]
    pins: list[int]
    num_decodes: int


def num_requests_in(steps: Iterable[StepInFlight]) -> int:
    """Requests in these steps, those that have ended meanwhile included."""
    return len({id(seq.request) for one in steps for seq in (*one.sequences, *one.forked)})


class InstanceState:
    """The scheduler's state, with the transitions that end things."""

    def __init__(
        self,
        limits: InstanceLimits,
        policy: SchedulingPolicy,
        owned: OwnedMemory | None = None,
    ) -> None:
        self.limits = limits
        self.policy = policy
        self.tables = BlockTables(limits, owned)
        self.requests: dict[str, RequestState] = {}
        self.lone: dict[str, RequestState] = {}
        """Those of them that share no step; what waits of them is not in `waiting`."""
        self.num_with_logprobs = 0
        self.waiting = policy.waiting
        self.deadlines = DeadlineQueue()
        self.holds = DeadlineQueue()
        # Running sequences. Those that left are swept out before the next plan (`is_stale`).
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.paused: list[Sequence] = []
        """Sequences that keep their blocks and their number but have no seat."""
        self.num_running = 0
        self.num_offline_running = 0
        self.num_held = 0
        self.is_stale = False
        self.steps: dict[int, StepInFlight] = {}
        self.pending_forks: list[PendingFork] = []
        self.forgotten: list[int] = []
        """Numbers that the worker can forget with the next plan."""
        self.outcome = StepOutcome()
        self.latency = LatencyMeter()
        self.expert_load = ExpertLoad(limits.num_experts)
        self.idleness = IdleMeter()
        self.num_preemptions = 0
        self.num_pauses = 0
        self.num_drafts = 0
        self.num_accepted_drafts = 0
        self.is_draining = False

    def add(self, request: RequestState) -> None:
        """A request is open from now on. Its id must not be."""
        self.requests[request.request_id] = request
        if request.runs_alone:
            self.lone[request.request_id] = request
        self.num_with_logprobs += request.wants_logprobs

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""
        return len(self.waiting) + len(self.lone_waiting)

    @property
    def lone_waiting(self) -> list[Sequence]:
        """Those of them whose requests share no step."""
        waiting = SequencePhase.WAITING
        return [s for one in self.lone.values() for s in one.sequences if s.state is waiting]

    def join(self, request: RequestState) -> None:
        """A request that shared no step shares them from now on. None of it is in flight."""
        del self.lone[request.request_id]
        request.runs_alone = False
        for seq in request.sequences:
            if seq.state is SequencePhase.WAITING:
                self.waiting.push(seq)

    def take_outcome(self) -> StepOutcome:
        """What was collected since the last call."""
        outcome = self.outcome
        self.outcome = StepOutcome()
        return outcome

    def enqueue(self, seq: Sequence) -> None:
        """A sequence without blocks waits for its turn."""
        seq.state = SequencePhase.WAITING
        if not seq.request.runs_alone:
            self.waiting.push(seq)

    def run(self, seq: Sequence) -> None:
        """A sequence with blocks runs from now on."""
        seq.state = SequencePhase.RUNNING
        self.num_running += 1
        self.num_offline_running += seq.key[0]
        (self.prefilling if seq.is_prefilling else self.decoding).append(seq)

    def preempt(self, seq: Sequence) -> None:
        """A running or paused sequence with no step in flight gives up its blocks and waits; it
        comes back under a new number, computed again from its prompt and outputs."""
        assert not seq.num_in_flight
        self.num_preemptions += 1
        if seq.state is SequencePhase.PAUSED:
            self.paused.remove(seq)
        else:
            self._leave_running(seq)
        self._forget_at_worker(seq)
        self.tables.release(seq)
        seq.is_prefilling = True
        self.enqueue(seq)

    def pause(self, seq: Sequence) -> None:
        """A running sequence with no step in flight gives up its seat and keeps its blocks."""
        assert not seq.num_in_flight
        self.num_pauses += 1
        self._leave_running(seq)
        seq.state = SequencePhase.PAUSED
        self.paused.append(seq)

    def resume(self, seq: Sequence) -> None:
        """A paused sequence goes on where it was. The running lists must have been swept."""
        assert not self.is_stale
        self.paused.remove(seq)
        self.run(seq)

    def hold(self, seq: Sequence) -> None:
        """A prefilled sequence without a step in flight runs no more but keeps its blocks."""
        assert not seq.num_in_flight
        self._leave_running(seq)
        self._forget_at_worker(seq)
        self.tables.slots.release(seq)
        seq.state = SequencePhase.HELD
        self.num_held += 1

    def finish_sequence(self, seq: Sequence) -> None:
        """A sequence is over. Its blocks go now, or when the step in flight that writes them is
        settled."""
        if seq.state is SequencePhase.WAITING:
            seq.state = SequencePhase.FINISHED
            if not seq.request.runs_alone:
                self.waiting.note_gone(seq)
        elif seq.state is SequencePhase.RUNNING:
            self._leave_running(seq)
            seq.state = SequencePhase.FINISHED
        elif seq.state is SequencePhase.PAUSED:
            self.paused.remove(seq)
            seq.state = SequencePhase.FINISHED
        elif seq.state is SequencePhase.HELD:
            self.num_held -= 1
            seq.state = SequencePhase.FINISHED
        seq.request.sequences.remove(seq)
        if not seq.num_in_flight:
            self.bury(seq)

    def bury(self, seq: Sequence) -> None:
        """Nothing touches a finished sequence any more."""
        self._forget_at_worker(seq)
        self.tables.release(seq)

    def close_choice(self, request: RequestState, choice: int) -> None:
        """A choice has its finish reason, or nobody wants it any more. The last one ends the
        request."""
        request.open_choices &= ~(1 << choice)
        if request.open_choices:
            return
        for seq in tuple(request.sequences):
            self.finish_sequence(seq)
        self._forget(request)
        self.outcome.ended.append(request.ended())

    def end_request(self, request: RequestState, code: str = "", message: str = "") -> None:
        """Stop all of a request at once. With a code its terminal word says so; without one it
        ends silently (it was cancelled or replaced by the router, which knows)."""
        request.open_choices = 0
        for seq in tuple(request.sequences):
            self.finish_sequence(seq)
        self._forget(request)
        if code:
            self.outcome.ended.append(request.ended(code, message))

    def sweep(self) -> None:
        """Drop from the running lists what no longer belongs there."""
        running = SequencePhase.RUNNING
        self.decoding = [
            seq for seq in self.decoding if seq.state is running and not seq.is_prefilling
        ]
        self.prefilling = [
            seq for seq in self.prefilling if seq.state is running and seq.is_prefilling
        ]
        self.is_stale = False

    def _forget(self, request: RequestState) -> None:
        del self.requests[request.request_id]
        self.lone.pop(request.request_id, None)
        self.num_with_logprobs -= request.wants_logprobs

    def _leave_running(self, seq: Sequence) -> None:
        self.num_running -= 1
        self.num_offline_running -= seq.key[0]
        self.is_stale = True

    def _forget_at_worker(self, seq: Sequence) -> None:
        """The worker forgets a sequence, or never learns it if it is a pending fork."""
        if self.pending_forks:
            kept = []
            for fork in self.pending_forks:
                if fork.child is not seq:
                    kept.append(fork)
                    continue
                if fork.copy is not None:
                    self.tables.unpin(fork.copy[0])
                seq.number = -1
            self.pending_forks = kept
        if seq.number >= 0:
            self.forgotten.append(seq.number)
            seq.number = -1
