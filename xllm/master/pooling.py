"""The vectors of a step's result against the plan that it answers."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from xllm.errors import BadMessageError
from xllm.master.lifecycle import StepInFlight
from xllm.master.sequence import SequencePhase
from xllm.protocol.step import StepResult

_NUMBER_BYTES = 4


def read_vectors(
    step: StepInFlight,
    result: StepResult,
    frames: AbstractSequence[bytes],
    failed: dict[int, str] | None,
    size: int,
) -> dict[int, bytes]:
    """The vectors of `size` numbers that a step gave, by the index of their items. BadMessageError,
    before anything is settled, where the frame has another size or an item that completes a
    sequence with pooling has none. `failed`: items that did not run."""
    pooled = result.pooled
    vectors: dict[int, bytes] = {}
    if pooled:
        before = (3 if result.num_top >= 0 else 0) + result.expert_frames
        frame = frames[before] if len(frames) > before else b""
        width = size * _NUMBER_BYTES
        if len(frame) != width * len(pooled):
            raise BadMessageError(
                f"step {result.step} announces {len(pooled)} vectors of {size} numbers and their "
                f"frame has {len(frame)} bytes"
            )
        for row, index in enumerate(pooled):
            vectors[index] = frame[row * width : (row + 1) * width]
    for index, (seq, item) in enumerate(zip(step.sequences, step.plan.items, strict=True)):
        if not seq.pooling or seq.state is not SequencePhase.RUNNING:
            continue
        is_last = item.start + item.num_tokens == seq.num_tokens
        if is_last and index not in vectors and not (failed and index in failed):
            raise BadMessageError(f"step {result.step}: item {index} has no vector")
    return vectors
