"""What a new instance measures before it serves: a few prompts and decodes through its own
scheduler, so that step times are known from the first request on and refitted by all later ones.

`profile_load` is pure; `StartProfile` runs it, one wave after another. It knows no sockets and no
clock. Invariant: when it is over nothing of it is open; a wave begins only if GROWTH times the
longest step so far fits into what is left of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from xllm.errors import BadMessageError, EngineError
from xllm.kvcache.hashing import root_hash
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler
from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import StepPlan, StepResult

GROWTH = 5
"""A wave is expected to take at most so many times what the longest step so far took."""
_LENGTHS = (16, 64, 256, 1024)
_TAIL = 32
_OUTPUT = 6
_SALT = root_hash("step times")
"""No request of a client has this root: nothing of the profile is ever a hit."""


def profile_load(limits: InstanceLimits) -> Iterator[list[AdmitRequest]]:
    """Waves of requests, each for when the one before it is done. The first one warms up; then
    prompts of growing length, each once alone and once more with a tail, so that it is computed
    behind its own beginning, and sequences that decode, alone and side by side. Where the model
    embeds nothing decodes, and prompts become vectors."""
    most = min(limits.max_num_batched_tokens, limits.max_model_len - _TAIL - 2)
    most = min(most, limits.num_blocks * limits.block_size // 2 - _TAIL)
    if most < _LENGTHS[0]:
        return
    yield [_request(limits, "warm", _LENGTHS[0], 2)]
    for length in _LENGTHS:
        if length <= most:
            yield [_request(limits, f"prompt-{length}", length, 1)]
            yield [_request(limits, f"prompt-{length}", length + _TAIL, 1)]
        if length == _LENGTHS[0] and limits.task != "embed":
            yield from _decodes(limits)


def _decodes(limits: InstanceLimits) -> Iterator[list[AdmitRequest]]:
    """One sequence, then as many as there is room for, up to eight."""
    num_blocks = -(-(_LENGTHS[0] + _OUTPUT) // limits.block_size)
    room = limits.num_blocks // (2 * num_blocks)
    for num in (1, max(1, min(8, limits.max_num_seqs, limits.max_waiting, room))):
        yield [_request(limits, f"decode-{num}-{i}", _LENGTHS[0], _OUTPUT) for i in range(num)]


def _request(limits: InstanceLimits, name: str, num_prompt: int, num_output: int) -> AdmitRequest:
    """Prompts of equal names begin alike, and those of others differ from the first id on."""
    start = sum(name.encode())
    ids = tuple((start + 7 * index) % limits.vocab_size for index in range(num_prompt))
    embeds = limits.task == "embed"
    max_tokens = 0 if embeds else num_output
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0)
    request_id = f"profile-{name}-{num_prompt}"
    return AdmitRequest(request_id, 1, limits.model, ids, sampling, salt=_SALT, embed=embeds)


class StartProfile:
    """`send_plan(plan)` reaches the worker; `finished()` is called once, at the end. Monotonic
    seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        seconds: float,
        send_plan: Callable[[StepPlan], None],
        finished: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._waves = profile_load(scheduler.limits)
        self._seconds = seconds
        self._send_plan = send_plan
        self._finished = finished
        self._num_waves = 0
        self._ends_at = self._settled_at = 0.0
        self._longest_s = 0.0
        self._is_over = False

    def begin(self, now: float) -> None:
        """Send the first plans."""
        self._ends_at, self._settled_at = now + self._seconds, now
        self._go_on(now)

    def settle(self, result: StepResult, frames: Sequence[bytes], now: float) -> None:
        """A step came back. The first wave's tell nothing: kernels are chosen in them."""
        if self._num_waves == 1:
            result = msgspec.structs.replace(result, duration_ns=0)
        else:
            self._longest_s = max(self._longest_s, now - self._settled_at)
        self._settled_at = now
        try:
            self._scheduler.update(result, frames, now)
        except BadMessageError as error:
            self.fail(result.step, EngineError.code, error.message, now)
            return
        self._go_on(now)

    def fail(self, step: int, code: str, message: str, now: float) -> None:
        """A step failed: what was measured is all there will be. Whoever serves next will see
        whether the worker can."""
        self._waves = iter(())
        self._scheduler.fail_step(step, code, message)
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        scheduler = self._scheduler
        scheduler.expire(now)  # what it says to routers concerns none
        if scheduler.is_idle and not self._is_over:
            self._next_wave(now)
        while (plan := scheduler.schedule(now)) is not None:
            self._send_plan(plan)
        if scheduler.is_idle and not self._is_over:
            self._is_over = True
            scheduler.take_latency()  # nobody waited
            self._finished()

    def _next_wave(self, now: float) -> None:
        """The next wave, if it will be over in time."""
        if now + GROWTH * self._longest_s > self._ends_at:
            return
        self._num_waves += 1
        for request in next(self._waves, ()):
            refusal = self._scheduler.admit(request, now)
            assert refusal is None, refusal
