"""Whether a request comes in: its bounds, the queue's bound, attempts, draining.

Bad requests are answered with a code and the numbers before anything is allocated. A request
that comes in is split into the sequences that will run it: one leader that prefills for all
choices and forks, or, after a resume, one sequence a choice. Never decides when they run.
"""

from __future__ import annotations

import msgspec

from xllm.errors import (
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
    XllmError,
)
from xllm.kvcache.hashing import HASH_BYTES, chain_hashes, root_hash, split_hashes
from xllm.master.lifecycle import InstanceState
from xllm.master.request import RequestState
from xllm.master.sequence import Sequence
from xllm.protocol.instance import AdmitRequest, RequestEnded, TokenItem
from xllm.protocol.token_bytes import TOKEN_BYTES, unpack_tokens


def unpacked(message: AdmitRequest) -> AdmitRequest:
    """The same request with its prompt as ids. InvalidRequestError where that is none."""
    packed = message.packed_prompt
    if message.prompt_ids or len(packed) % TOKEN_BYTES:
        raise InvalidRequestError(
            f"packed_prompt has {len(packed)} bytes beside {len(message.prompt_ids)} prompt_ids: "
            f"give one of them, {TOKEN_BYTES} bytes an id",
            param="prompt",
        )
    ids = tuple(unpack_tokens(packed))
    return msgspec.structs.replace(message, prompt_ids=ids, packed_prompt=b"")


class Admission:
    """Takes requests into an InstanceState."""

    def __init__(self, state: InstanceState) -> None:
        self._state = state
        self._eos = frozenset(state.limits.eos_ids)
        self._num_admitted = 0

    def admit(self, message: AdmitRequest, now: float) -> RequestEnded | None:
        """Take a request in: None, or why not. The same attempt again is ignored; a higher one
        replaces what runs; a lower one is refused as a conflict."""
        state = self._state
        old = state.requests.get(message.request_id)
        if old is not None and message.attempt == old.attempt:
            return None
        try:
            if old is not None and message.attempt < old.attempt:
                raise ConflictError(f"attempt {old.attempt} of this request runs here")
            if message.packed_prompt:
                message = unpacked(message)
            request = self._make(message, now)
        except XllmError as error:
            return RequestEnded(
                message.request_id, message.attempt, error.code, error.message, error.param or ""
            )
        if old is not None:
            state.end_request(old)
        state.add(request)
        if request.deadline:
            state.deadlines.push(request, request.deadline)
        self._make_sequences(request)
        return None

    def _make(self, message: AdmitRequest, now: float) -> RequestState:
        limits = self._state.limits
        if self._state.is_draining:
            raise UnavailableError("the instance drains and admits nothing more")
        num_waiting = self._state.num_waiting
        if num_waiting >= limits.max_waiting:
            raise OverloadedError(
                f"{num_waiting} sequences wait here, the limit is {limits.max_waiting}"
            )
        if message.model and limits.model and message.model != limits.model:
            raise ModelNotFoundError(
                f"this instance serves {limits.model!r}, not {message.model!r}", param="model"
            )
        self._check_task(message)
        sampling = message.sampling
        # A prompt that cannot fit is refused with the numbers, before its ids are looked at.
        end = limits.sequence_end(len(message.prompt_ids), sampling.max_tokens)
        self._check_tokens(message)
        root, hashes = self._hashes(message)
        stop_ids, stop_tuple = self._eos, limits.eos_ids
        if sampling.stop_token_ids or sampling.ignore_eos:
            own = frozenset(sampling.stop_token_ids)
            stop_ids = own if sampling.ignore_eos else own | self._eos
            stop_tuple = tuple(sorted(stop_ids))
        self._num_admitted += 1
        arrival = self._num_admitted
        # What this instance is to do of the request; a route without its name means all of it.
        roles = {role for role, instance in message.stages if instance == limits.instance}
        return RequestState(
            message,
            arrival,
            now,
            end,
            stop_ids,
            stop_tuple,
            root,
            hashes,
            roles == {"prefill"},
        )

    def _check_task(self, message: AdmitRequest) -> None:
        limits = self._state.limits
        if message.embed != (limits.task == "embed"):
            raise InvalidRequestError(
                f"{limits.model!r} is served for {limits.task} (model.task)", param="model"
            )
        sampling = message.sampling
        if message.embed and (sampling.max_tokens != 0 or sampling.n != 1):
            raise InvalidRequestError(
                f"a vector is asked for with max_tokens {sampling.max_tokens} and n {sampling.n}, "
                f"not 0 and 1",
                param="max_tokens",
            )

    def _check_tokens(self, message: AdmitRequest) -> None:
        limits = self._state.limits
        if not message.prompt_ids:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if message.sampling.n < 1 or len(message.outputs) > message.sampling.n:
            raise InvalidRequestError(
                f"n is {message.sampling.n} and {len(message.outputs)} choices have outputs",
                param="n",
            )
        outputs = [("outputs", ids) for ids in message.outputs]
        for name, ids in [("prompt", message.prompt_ids), *outputs]:
            if ids and (min(ids) < 0 or max(ids) >= limits.vocab_size):
                raise InvalidRequestError(
                    f"a token id is not in [0, {limits.vocab_size})", param=name
                )
            if len(ids) > limits.max_model_len:
                raise InvalidRequestError(
                    f"{len(ids)} tokens are more than the context of {limits.max_model_len}",
                    param=name,
                )

    def _hashes(self, message: AdmitRequest) -> tuple[bytes, list[bytes]]:
        """The root of the request's hash chain and the hashes of its prompt's full blocks."""
        limits = self._state.limits
        if not limits.prefix_cache:
            return b"", []
        root = message.salt
        if len(root) != HASH_BYTES:
            if root:
                raise InvalidRequestError(
                    f"the hash root has {len(root)} bytes, not {HASH_BYTES}", param="salt"
                )
            root = root_hash(limits.revision, message.adapter, b"", message.media_hashes)
        num_full = len(message.prompt_ids) // limits.block_size
        hashes = message.block_hashes
        if num_full and not hashes:
            hashes = chain_hashes(root, message.prompt_ids, limits.block_size)
        if len(hashes) != num_full * HASH_BYTES:
            raise InvalidRequestError(
                f"{len(hashes)} bytes of block hashes for {num_full} blocks of "
                f"{limits.block_size} tokens",
                param="block_hashes",
            )
        return root, split_hashes(hashes)

    def _make_sequences(self, request: RequestState) -> None:
        outputs = request.message.outputs
        num_choices = request.sampling.n
        if not any(outputs):
            leader = Sequence(request, 0, [], list(request.hashes))
            leader.num_samples = num_choices
            sequences = [leader]
        else:
            sequences = []
            for choice in range(num_choices):
                known = list(outputs[choice]) if choice < len(outputs) else []
                sequences.append(Sequence(request, choice, known, list(request.hashes)))
        request.sequences = sequences
        scores = request.sampling.prompt_logprobs is not None
        for seq in tuple(sequences):
            if request.embeds:
                seq.pooling = self._state.limits.pooling
            reason = seq.finish_reason()
            if reason and (seq.output or not (scores or seq.pooling)):
                self._finish_at_once(request, seq, reason)
                continue
            if reason:
                # max_tokens is 0: only the prompt's scores or its vector are wanted.
                seq.num_samples = 0
            seq.scores_prompt = scores
            scores = False
            self._state.enqueue(seq)

    def _finish_at_once(self, request: RequestState, seq: Sequence, reason: str) -> None:
        """A choice whose outputs are already complete is never run."""
        last = seq.choice + max(seq.num_samples, 1)
        request.sequences.remove(seq)
        for choice in range(seq.choice, last):
            stop_id = seq.output[-1] if reason == "stop" else -1
            self._state.outcome.items.append(
                TokenItem(
                    request.request_id,
                    choice,
                    request.attempt,
                    len(seq.output),
                    (),
                    reason,
                    stop_id,
                )
            )
            self._state.close_choice(request, choice)
