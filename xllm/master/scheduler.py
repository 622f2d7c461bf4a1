"""The scheduler of one instance: requests in, step plans out, step results in, tokens out.

A facade: admission, planning, settling and the ways to end live in files of their own, over one
InstanceState. Plain Python: no sockets, threads or clock (`now` is monotonic seconds, given by
the caller). The caller asks for plans (`schedule`), has them run in that order, and answers each in
that order (`update` or `fail_step`). With `limits.max_in_flight` 2 a plan is made while the one
before it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence

from xllm.errors import DeadlineError
from xllm.kvcache.owners import OwnedMemory
from xllm.kvcache.slots import SlotTableStatistics
from xllm.master.admission import Admission
from xllm.master.audit import check_state
from xllm.master.holding import end_holds
from xllm.master.lifecycle import InstanceState, num_requests_in
from xllm.master.limits import InstanceLimits
from xllm.master.outcome import StepOutcome
from xllm.master.planning import StepPlanner
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence
from xllm.master.settling import StepSettler
from xllm.master.strategies.page_turns import PageTurns
from xllm.master.strategies.policy import SchedulingPolicy, build_policy
from xllm.protocol.bus import BlockEvents, InstanceLatency
from xllm.protocol.instance import AdmitRequest, RequestEnded
from xllm.protocol.step import StepPlan, StepResult


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """How busy an instance is. `num_waiting` and `num_running` count sequences;
    `num_available_blocks` are free or cached without holder; `waiting_tokens` still have to be
    computed, `running_tokens` are held by running sequences; `num_held` counts sequences that are
    prefilled for another instance, `num_paused` those that keep their KV without running,
    `num_pauses` how often that began. `worker_busy_s` is the time of all steps, `worker_idle_s`
    that between steps while there was work. `slots`: None at a worker that has none. `num_drafts`
    were verified, `num_accepted_drafts` of them were what was drawn."""

    num_requests: int
    num_waiting: int
    num_running: int
    num_offline: int
    num_blocks: int
    num_available_blocks: int
    num_cached_blocks: int
    waiting_tokens: int
    running_tokens: int
    num_steps_in_flight: int
    num_preemptions: int
    num_evictions: int
    num_held: int = 0
    worker_busy_s: float = 0.0
    worker_idle_s: float = 0.0
    num_paused: int = 0
    num_pauses: int = 0
    slots: SlotTableStatistics | None = None
    num_drafts: int = 0
    num_accepted_drafts: int = 0


class Scheduler:
    """Continuous batching for one model on one instance."""

    def __init__(
        self,
        limits: InstanceLimits,
        policy: SchedulingPolicy | None = None,
        owned: OwnedMemory | None = None,
        turns: PageTurns | None = None,
    ) -> None:
        """`policy` is this scheduler's own; None: the default settings'. Where its model shares
        the pages with others: what it has of them, and their turns."""
        self.limits = limits
        self._state = InstanceState(limits, policy or build_policy(), owned)
        self.expert_load = self._state.expert_load
        self._admission = Admission(self._state)
        self._planner = StepPlanner(self._state, turns)
        self._settler = StepSettler(self._state, self._planner)

    @property
    def requests(self) -> Mapping[str, RequestState]:
        """Open requests by id, to look at."""
        return self._state.requests

    @property
    def num_requests(self) -> int:
        """Open requests."""
        return len(self._state.requests)

    @property
    def is_idle(self) -> bool:
        """Nothing is open and nothing in flight."""
        return not self._state.requests and not self._state.steps

    def admit(self, request: AdmitRequest, now: float) -> RequestEnded | None:
        """Take a request in (None), or say why not: codes context_length_exceeded with the
        numbers, invalid_value, model_not_found, overloaded, unavailable, conflict. What a
        resumed request finished before it came is in the next outcome."""
        return self._admission.admit(request, now)

    def cancel(self, request_id: str, attempt: int, choice: int = -1) -> None:
        """Stop a request (silently) or one choice of it (the request then ends with its last
        choice). Unknown requests and older attempts are ignored."""
        state = self._state
        request = state.requests.get(request_id)
        if request is None or attempt < request.attempt:
            return
        if choice < 0:
            state.end_request(request)
            return
        if not request.is_open(choice):
            return
        for seq in tuple(request.sequences):
            # A leader that did not fork yet stands for the others too; the last one ends it.
            if seq.choice == choice and seq.num_samples == 1:
                state.finish_sequence(seq)
        state.close_choice(request, choice)

    def release_hold(self, request_id: str, attempt: int) -> bool:
        """The KV of a held request is no longer needed here: it ends silently. False, and nothing
        changes, for what is unknown, of another attempt, or not held."""
        request = self._state.requests.get(request_id)
        if request is None or request.attempt != attempt or not request.is_held:
            return False
        self._state.end_request(request)
        return True

    def schedule(self, now: float, is_clear: bool = True) -> StepPlan | None:
        """The next step, or None where there is nothing to do or enough is in flight. `is_clear`:
        nothing of another model is under way at the worker."""
        return self._planner.plan(now, is_clear)

    @property
    def is_apart(self) -> bool:
        """Whether no other model may have a step planned now: one that a request shares with
        nobody is under way, or is to be the next."""
        return self._planner.is_apart

    @property
    def is_lone(self) -> bool:
        """Whether such a step is under way."""
        return self._planner.is_lone

    @property
    def num_in_steps(self) -> int:
        """Requests in the steps in flight, those that have ended meanwhile included."""
        return num_requests_in(self._state.steps.values())

    def update(
        self, result: StepResult, frames: AbstractSequence[bytes], now: float
    ) -> StepOutcome:
        """Take in the result of a plan. BadMessageError if it contradicts the plan: the step is
        then still in flight, and `fail_step` is the answer."""
        self._settler.settle(result, frames, now)
        return self._state.take_outcome()

    def fail_step(self, step: int, code: str, message: str) -> StepOutcome:
        """A step failed as a whole: the requests in it end with this code, and hear whether they
        were several."""
        state = self._state
        shared = step in state.steps and num_requests_in((state.steps[step],)) > 1
        self._settler.fail(step, code, message)
        outcome = state.take_outcome()
        outcome.mark(code, shared=shared)
        return outcome

    def fail_all(self, code: str, message: str, in_step: str = "") -> StepOutcome:
        """Every request ends with this code, those of steps in flight with `in_step` if given."""
        for number in tuple(self._state.steps):  # oldest first
            self._settler.fail(number, in_step or code, message)
        for request in tuple(self._state.requests.values()):
            self._state.end_request(request, code, message)
        return self._state.take_outcome()

    def expire(self, now: float) -> StepOutcome:
        """End the requests whose deadline has passed, with code deadline_exceeded, and the holds
        whose time is over, with code unavailable. Also hands over whatever admissions and
        cancels have left to say. Cheap where there is nothing."""
        state = self._state
        for request in state.deadlines.pop_passed(now):
            if request.open_choices:
                waited = now - request.admitted_at
                state.end_request(
                    request, DeadlineError.code, f"not finished {waited:.3f} s after admission"
                )
        end_holds(state, now)
        return state.take_outcome()

    @property
    def next_deadline(self) -> float | None:
        """When `expire` may next end a request."""
        state = self._state
        times = (state.deadlines.next_deadline(), state.holds.next_deadline())
        return min((time for time in times if time is not None), default=None)

    def drain(self) -> None:
        """Admit nothing more."""
        self._state.is_draining = True

    def quiet_steps(self) -> int:
        """For how many steps from now the batch stays as it is, unless a request comes or is
        cancelled, a stop id is drawn, or `next_deadline` passes (steps have no length here: who
        folds them compares): only decodes run, none reaches its length, all blocks that they
        need are there. 0 while anything waits, prefills or is in flight, and where tokens are
        guessed. The scheduler is advanced through these steps by their results, since its blocks
        are hashed by tokens."""
        state = self._state
        if len(state.waiting) or state.steps or state.is_stale or state.prefilling:
            return 0
        if state.paused or state.lone or state.policy.drafts is not None:
            return 0
        if not state.decoding:
            return 0
        left = min(seq.end - seq.num_tokens for seq in state.decoding) - 1
        size = self.limits.block_size
        available = state.tables.cache.num_available
        worst = len(state.decoding)
        # Every decode begins at most one block in `size` steps.
        return max(0, min(left, available // worst * size))

    def drain_events(self) -> BlockEvents | None:
        """Blocks cached and evicted since the last call."""
        return self._state.tables.cache.drain_events()

    @property
    def cached_blocks(self) -> tuple[int, int]:
        """How many blocks are cached, and their digest."""
        cache = self._state.tables.cache
        return cache.num_cached, cache.digest

    def snapshot_blocks(self) -> bytes:
        """Hashes of all cached blocks."""
        return self._state.tables.cache.snapshot()

    def take_latency(self) -> InstanceLatency:
        """Latencies since the last call."""
        return self._state.latency.take()

    def statistics(self) -> SchedulerStatistics:
        """A snapshot; does not mutate."""
        state = self._state
        if state.is_stale:
            state.sweep()
        waiting = [*state.waiting, *state.lone_waiting]
        cache = state.tables.cache.statistics()
        table = state.tables.slots.table
        running: list[Sequence] = [*state.decoding, *state.prefilling]
        waiting_tokens = sum(seq.num_tokens for seq in waiting)
        waiting_tokens += sum(seq.num_tokens - seq.num_computed for seq in state.prefilling)
        return SchedulerStatistics(
            num_requests=len(state.requests),
            num_waiting=len(waiting),
            num_running=state.num_running,
            num_offline=state.num_offline_running
            + sum(seq.key[0] for seq in (*waiting, *state.paused)),
            num_blocks=self.limits.num_blocks,
            num_available_blocks=cache.num_available,
            num_cached_blocks=cache.num_cached,
            waiting_tokens=waiting_tokens,
            running_tokens=sum(seq.num_tokens for seq in running),
            num_steps_in_flight=len(state.steps),
            num_preemptions=state.num_preemptions,
            num_evictions=cache.num_evicted,
            num_held=state.num_held,
            worker_busy_s=state.idleness.busy_ns / 1e9,
            worker_idle_s=state.idleness.idle_ns / 1e9,
            num_paused=len(state.paused),
            num_pauses=state.num_pauses,
            slots=None if table is None else table.statistics(),
            num_drafts=state.num_drafts,
            num_accepted_drafts=state.num_accepted_drafts,
        )

    def check(self) -> None:
        """Raise InvariantError, with the story, where the state contradicts itself."""
        check_state(self._state)
