"""Whether an instance's state can be: every invariant of the scheduler's parts, looked at.

Reads everything and changes nothing; costs time in proportion to the state, so tests call it
after every step and processes do not.
"""

from __future__ import annotations

from xllm.errors import InvariantError
from xllm.master.lifecycle import InstanceState
from xllm.master.sequence import Sequence, SequencePhase


def check_state(state: InstanceState) -> None:
    """Raise InvariantError with a sequence's story where something contradicts itself."""
    sequences = _all_sequences(state)
    _check_requests(state)
    _check_membership(state)
    _check_lone(state)
    for seq in sequences:
        _check_sequence(state, seq)
    pins = [fork.copy[0] for fork in state.pending_forks if fork.copy is not None]
    for step in state.steps.values():
        pins.extend(step.pins)
    state.tables.check(sequences, pins)


def _all_sequences(state: InstanceState) -> list[Sequence]:
    found: dict[int, Sequence] = {}
    for request in state.requests.values():
        for seq in request.sequences:
            found[id(seq)] = seq
    for step in state.steps.values():
        for seq in step.sequences:
            found[id(seq)] = seq
    return list(found.values())


def _check_requests(state: InstanceState) -> None:
    wanting = sum(request.wants_logprobs for request in state.requests.values())
    if wanting != state.num_with_logprobs:
        raise InvariantError(f"{state.num_with_logprobs} want logprobs, but {wanting} are open")
    for request_id, request in state.requests.items():
        if not request.open_choices or request.request_id != request_id:
            raise InvariantError(f"request {request_id} is kept and has no open choice")
        covered = 0
        for seq in request.sequences:
            if seq.state is SequencePhase.FINISHED:
                raise InvariantError(f"finished and still listed: {seq.story()}")
            mask = (1 << request.sampling.n) - 1 if seq.num_samples > 1 else 1 << seq.choice
            if seq.num_samples == 0:
                mask = request.open_choices
            covered |= mask
        if request.open_choices & ~covered:
            raise InvariantError(f"request {request_id} has an open choice without a sequence")


def _check_membership(state: InstanceState) -> None:
    lists = (
        ("decoding", [s for s in state.decoding if not s.is_prefilling]),
        ("prefilling", [s for s in state.prefilling if s.is_prefilling]),
    )
    num_running = 0
    for name, members in lists:
        alive = [seq for seq in members if seq.state is SequencePhase.RUNNING]
        if len({id(seq) for seq in alive}) != len(alive):
            raise InvariantError(f"a sequence is listed twice as {name}")
        num_running += len(alive)
    if num_running != state.num_running:
        raise InvariantError(f"{state.num_running} running, but {num_running} are listed")
    if num_running > state.limits.max_running:
        raise InvariantError(f"{num_running} running, the limit is {state.limits.max_running}")
    open_sequences = [seq for r in state.requests.values() for seq in r.sequences]
    by_state = [seq.state for seq in open_sequences]
    if by_state.count(SequencePhase.RUNNING) != num_running:
        raise InvariantError("a running sequence belongs to no open request")
    if by_state.count(SequencePhase.HELD) != state.num_held:
        raise InvariantError(f"{state.num_held} held, but {len(by_state)} are open: {by_state}")
    if by_state.count(SequencePhase.PAUSED) != len(state.paused):
        raise InvariantError(f"{len(state.paused)} paused, but {len(by_state)} open: {by_state}")
    queued = {id(seq) for seq in (*state.waiting, *state.lone_waiting)}
    waiting = {id(seq) for seq in open_sequences if seq.state is SequencePhase.WAITING}
    if queued != waiting or len(queued) != state.num_waiting:
        raise InvariantError(
            f"{len(waiting)} wait, {len(queued)} are queued, {state.num_waiting} are counted"
        )


def _check_lone(state: InstanceState) -> None:
    alone = {name for name, request in state.requests.items() if request.runs_alone}
    if alone != set(state.lone):
        raise InvariantError(f"{sorted(alone)} run alone, {sorted(state.lone)} are listed")
    in_steps = [s for step in state.steps.values() for s in (*step.sequences, *step.forked)]
    together = {seq.request_id for seq in in_steps}
    if any(seq.request.runs_alone for seq in in_steps) and len(together) > 1:
        raise InvariantError(f"one of {sorted(together)} is to run alone")


def _check_sequence(state: InstanceState, seq: Sequence) -> None:
    wrong = ""
    size = state.limits.block_size
    if seq.num_tokens != seq.num_prompt + len(seq.output):
        wrong = "its tokens are miscounted"
    elif seq.capacity != len(seq.block_ids) * size or seq.num_computed > seq.capacity:
        wrong = "its blocks do not cover what is computed"
    elif not seq.num_computed <= seq.num_planned <= min(seq.capacity, seq.end):
        wrong = f"{seq.num_planned} tokens are planned"
    elif len(seq.block_ids) > -(-seq.end // size):
        wrong = "it has more blocks than it can ever need"
    elif seq.num_sealed * size > seq.num_computed:
        wrong = "a block is sealed before it is computed"
    elif seq.state is SequencePhase.WAITING and (seq.block_ids or seq.number >= 0):
        wrong = "it waits with blocks or a number"
    elif seq.state is SequencePhase.HELD and (not seq.block_ids or seq.number >= 0):
        wrong = "it is held without blocks or with a number"
    elif seq.state is SequencePhase.PAUSED:
        if seq.number < 0 or not seq.block_ids or seq.num_in_flight:
            wrong = "it is paused without a number or blocks, or with a step in flight"
    elif seq.state is SequencePhase.RUNNING:
        if seq.num_tokens >= seq.end and seq.num_samples:
            wrong = "it runs past its end"
        elif seq.number < 0 or not seq.block_ids:
            wrong = "it runs without a number or blocks"
        elif not seq.is_prefilling and seq.num_computed != seq.num_tokens - 1:
            wrong = "it decodes with more than one token to compute"
        elif not seq.is_prefilling and seq.num_planned != (
            seq.num_computed + seq.num_in_flight + seq.num_drafts
        ):
            wrong = "its planned tokens are not those in flight"
        elif seq.num_drafts and (seq.num_in_flight != 1 or seq.is_prefilling):
            wrong = f"{seq.num_drafts} drafts are verified with {seq.num_in_flight} steps in flight"
        elif not seq.num_in_flight and seq.num_planned != seq.num_computed:
            wrong = "tokens are planned and no step is in flight"
        elif any(not state.tables.cache.hash_of(b) for b in seq.block_ids[: seq.num_sealed]):
            wrong = "a sealed block is not cached"
    if wrong:
        raise InvariantError(f"{wrong}: {seq.story()}")
