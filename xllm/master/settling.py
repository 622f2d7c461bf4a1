"""What a step's result means: tokens, seals, stops, forks, ends, failures.

Stop ids and lengths are settled here, when the real token is known; what a step gave a sequence
that had ended meanwhile is dropped, uncounted. Knows nothing of what runs next. Steps are settled
in the order of their plans. Invariant: after a step is settled none of its sequences has it in
flight, whatever came of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence

from xllm.errors import BadMessageError, EngineError
from xllm.master.accepting import contradicts, take_drawn
from xllm.master.holding import PrefillHolder
from xllm.master.lifecycle import InstanceState, PendingFork, StepInFlight
from xllm.master.logprobs import LogprobFrames
from xllm.master.planning import StepPlanner
from xllm.master.pooling import read_vectors
from xllm.master.scoring import read_rows, report_scores
from xllm.master.sequence import Sequence, SequencePhase
from xllm.protocol.instance import PooledVector, TokenItem
from xllm.protocol.sampling import TokenLogprobs
from xllm.protocol.step import StepItem, StepResult


class StepSettler:
    """Carries step results into an InstanceState."""

    def __init__(self, state: InstanceState, planner: StepPlanner) -> None:
        self._state = state
        self._planner = planner
        self._holder = PrefillHolder(state)
        self._now = 0.0
        self._num_more = 0
        self._vectors: dict[int, bytes] = {}

    def settle(self, result: StepResult, frames: AbstractSequence[bytes], now: float) -> None:
        """Take a step's result in. One of a step that is not in flight is dropped (it failed
        already). BadMessageError, and the step stays in flight, if it contradicts its plan."""
        state = self._state
        step = state.steps.get(result.step)
        if step is None:
            return
        if len(result.tokens) != len(step.sequences):
            raise BadMessageError(
                f"step {result.step} has {len(step.sequences)} items and "
                f"{len(result.tokens)} results"
            )
        failed = dict(result.failed) if result.failed else None
        is_scored = result.num_top >= 0 or state.num_with_logprobs
        rows = read_rows(step, result, frames, failed) if is_scored else None
        if state.limits.pooling:
            self._vectors = read_vectors(step, result, frames, failed, state.limits.embedding_size)
        state.expert_load.note(result, frames)
        del state.steps[result.step]
        # Before anything is sealed: a pinned block that its sequence seals and then releases
        # would be cached and held without its parent.
        self._unpin(step)
        self._now, self._num_more = now, 0
        items = state.outcome.items
        running = SequencePhase.RUNNING
        index = -1
        for seq, item, drawn in zip(step.sequences, step.plan.items, result.tokens, strict=True):
            index += 1
            seq.num_in_flight -= 1
            has_failed = failed is not None and index in failed
            if has_failed:
                state.tables.slots.distrust(seq)
            if seq.state is not running:
                if not seq.num_in_flight:
                    state.bury(seq)
                continue
            if failed is not None and has_failed:
                state.end_request(seq.request, EngineError.code, failed[index])
                continue
            if seq.num_drafts or seq.is_prefilling or rows is not None or len(drawn) != 1:
                self._settle_slowly(seq, item, drawn, index, rows)
                continue
            # A decode without logprobs: nearly all items of nearly all steps.
            seq.num_computed = seq.num_tokens
            if seq.num_computed >= seq.seal_at:
                state.tables.seal(seq)
            token = drawn[0]
            output = seq.output
            first_index = len(output)
            output.append(token)
            seq.num_tokens += 1
            if token in seq.stop_ids or seq.num_tokens >= seq.end:
                self._finish(seq, first_index, drawn, None)
            else:
                items.append(TokenItem(seq.request_id, seq.choice, seq.attempt, first_index, drawn))
        state.latency.note_step(now, result.duration_ns / 1e9, step.num_decodes, self._num_more)
        state.idleness.note(result, state.num_running > 0 or state.num_waiting > 0)
        state.policy.learn(step.plan, step.num_decodes, result.duration_ns / 1e9)
        state.deadlines.sweep(len(state.requests))
        state.holds.sweep(len(state.requests))

    def fail(self, number: int, code: str, message: str) -> None:
        """A whole step failed: the requests of its sequences end. Unknown steps are ignored."""
        state = self._state
        step = state.steps.pop(number, None)
        if step is None:
            return
        for seq in step.sequences:
            seq.num_in_flight -= 1
        for seq in (*step.sequences, *step.forked):
            state.tables.slots.distrust(seq)
        self._unpin(step)
        self._fail_requests((*step.sequences, *step.forked), code, message)

    def _fail_requests(self, sequences: Iterable[Sequence], code: str, message: str) -> None:
        for seq in sequences:
            if seq.state is SequencePhase.FINISHED:
                if seq.block_ids and not seq.num_in_flight:
                    self._state.bury(seq)
            elif seq.request.open_choices:
                self._state.end_request(seq.request, code, message)

    def _unpin(self, step: StepInFlight) -> None:
        for block_id in step.pins:
            self._state.tables.unpin(block_id)

    def _settle_verified(
        self,
        seq: Sequence,
        item: StepItem,
        drawn: tuple[int, ...],
        index: int,
        rows: LogprobFrames | None,
    ) -> None:
        """A decode with drafts."""
        state = self._state
        if contradicts(item, drawn):
            message = f"the worker drew {len(drawn)} tokens that do not follow the drafts"
            state.end_request(seq.request, EngineError.code, message)
            return
        state.num_drafts += seq.num_drafts
        first_index = len(seq.output)
        kept = take_drawn(seq, drawn)
        if not kept:
            return
        if seq.num_computed >= seq.seal_at:
            state.tables.seal(seq)
        num_more = len(kept) - 1
        state.num_accepted_drafts += num_more
        self._num_more += num_more
        if num_more and state.policy.counters is not None:
            state.policy.counters.charge(seq.request.message.tenant, 0, num_more)
        found = [self._read(seq, index, rows, which, len(drawn)) for which in range(len(kept))]
        logprobs = tuple(row for one in found if one is not None for row in one)
        self._finish(seq, first_index, kept, logprobs or None)

    def _settle_slowly(
        self,
        seq: Sequence,
        item: StepItem,
        drawn: tuple[int, ...],
        index: int,
        rows: LogprobFrames | None,
    ) -> None:
        """Prefills, logprobs, forks, drafts."""
        if seq.num_drafts:
            self._settle_verified(seq, item, drawn, index, rows)
            return
        state = self._state
        seq.num_computed = item.start + item.num_tokens
        if seq.num_computed >= seq.seal_at:
            state.tables.seal(seq)
        if rows is not None and item.score_prompt:
            report_scores(state, seq, item, index, rows)
        if seq.num_computed < seq.num_tokens:
            return
        if len(drawn) != item.num_samples:
            self._state.end_request(
                seq.request,
                EngineError.code,
                f"the worker drew {len(drawn)} tokens and not {item.num_samples}",
            )
            return
        if seq.is_prefilling:
            seq.is_prefilling = False
            state.is_stale = True
            state.decoding.append(seq)
            request = seq.request
            if not request.first_token_at:
                request.first_token_at = self._now
                state.latency.note_first_token(self._now - request.admitted_at)
        if seq.request.prefill_only and seq.num_samples:
            logprobs = [
                self._read(seq, index, rows, which, len(drawn)) for which in range(len(drawn))
            ]
            self._holder.take(seq, drawn, logprobs, self._now)
        elif seq.num_samples == 1:
            self._take_token(seq, drawn, self._read(seq, index, rows, 0, 1))
        elif seq.num_samples == 0:
            self._finish_scored(seq, self._vectors.get(index))
        else:
            self._fork(seq, drawn, index, rows)

    def _read(
        self, seq: Sequence, index: int, rows: LogprobFrames | None, which: int, num_drawn: int
    ) -> tuple[TokenLogprobs, ...] | None:
        """Logprobs of one of the drawn tokens, if the request wants any."""
        wanted = seq.request.sampling.logprobs
        if wanted is None or rows is None:
            return None
        row = rows.num_rows(index) - num_drawn + which
        return (rows.read(index, row, wanted),) if row >= 0 else None

    def _take_token(
        self, seq: Sequence, drawn: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None
    ) -> None:
        """One new token of a sequence that goes on or ends with it."""
        first_index = len(seq.output)
        seq.output.extend(drawn)
        seq.num_tokens += len(drawn)
        self._finish(seq, first_index, drawn, logprobs)

    def _finish(
        self,
        seq: Sequence,
        first_index: int,
        drawn: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> None:
        """Report new tokens, and the end if they are the end."""
        state = self._state
        reason = seq.finish_reason()
        stop_id = drawn[-1] if reason == "stop" else -1
        state.outcome.items.append(
            TokenItem(
                seq.request_id,
                seq.choice,
                seq.attempt,
                first_index,
                drawn,
                reason,
                stop_id,
                logprobs,
            )
        )
        if reason:
            state.finish_sequence(seq)
            state.close_choice(seq.request, seq.choice)

    def _finish_scored(self, seq: Sequence, vector: bytes | None) -> None:
        """Nothing was to be drawn, only the prompt to be scored or made a vector: all choices
        end."""
        state, request = self._state, seq.request
        if vector is not None:
            state.outcome.vectors.append(PooledVector(seq.request_id, seq.attempt, vector))
        state.finish_sequence(seq)
        for choice in range(request.sampling.n):
            if request.is_open(choice):
                state.outcome.items.append(
                    TokenItem(request.request_id, choice, request.attempt, 0, (), "length")
                )
                state.close_choice(request, choice)

    def _fork(
        self,
        leader: Sequence,
        drawn: tuple[int, ...],
        index: int,
        rows: LogprobFrames | None,
    ) -> None:
        """The leader drew the first token of every choice from one row of logits: each choice
        becomes a sequence of its own; the leader goes on as choice 0."""
        request = leader.request
        num = len(drawn)
        leader.num_samples = 1
        for choice in range(1, num):
            if request.is_open(choice):
                child = Sequence(request, choice, [], list(request.hashes))
                request.sequences.append(child)
                self._start_fork(leader, child, drawn[choice])
                self._finish_forked(child, self._read(leader, index, rows, choice, num))
        if not request.open_choices:
            return
        if request.is_open(0):
            self._take_token(leader, drawn[:1], self._read(leader, index, rows, 0, num))
        else:
            self._state.finish_sequence(leader)

    def _start_fork(self, leader: Sequence, child: Sequence, token: int) -> None:
        """Give a choice its first token and, if it goes on, a seat and blocks; where there are
        none it waits and is computed on its own."""
        state = self._state
        child.output.append(token)
        child.num_tokens += 1
        if child.finish_reason():
            child.state = SequencePhase.FINISHED
            return
        if not self._planner.may_fork(leader, child):
            state.enqueue(child)
            return
        copy = state.tables.fork(leader, child)
        if copy is False:
            state.enqueue(child)
            return
        child.number = self._planner.new_number()
        child.num_sent_blocks = len(child.block_ids)
        child.is_prefilling = False
        state.run(child)
        pair = copy if isinstance(copy, tuple) else None
        state.pending_forks.append(PendingFork(child, leader.number, tuple(child.block_ids), pair))

    def _finish_forked(self, child: Sequence, logprobs: tuple[TokenLogprobs, ...] | None) -> None:
        self._finish(child, 0, (child.output[0],), logprobs)
