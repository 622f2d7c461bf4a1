"""The ranks of one instance as one worker: what they report and give, made one.

Pure. Every rank runs every plan and draws the same tokens, since each has all logits; that they
do is checked with every step and costs a comparison. What rank 0 says is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from xllm.errors import ConfigError, EngineError
from xllm.protocol.step import StepResult, WorkerReady


def _identity(ready: WorkerReady) -> dict[str, object]:
    """What all ranks of an instance have alike."""
    return {
        "model": ready.model,
        "block_size": ready.block_size,
        "vocab_size": ready.vocab_size,
        "eos_ids": ready.eos_ids,
        "revision": ready.revision,
        "fingerprint": ready.fingerprint,
        "dtype": ready.dtype,
        "task": ready.task,
        "pooling": ready.pooling,
        "embedding_size": ready.embedding_size,
    }


def merge_ready(ranks: Sequence[WorkerReady]) -> WorkerReady:
    """What an instance can do: the least of its ranks, in rank order. Raises ConfigError where
    they did not load the same thing."""
    first = ranks[0]
    for ready in ranks[1:]:
        theirs = _identity(ready)
        for name, mine in _identity(first).items():
            if mine != theirs[name]:
                raise ConfigError(
                    f"the ranks of an instance differ in {name}: {mine!r} at rank {first.rank}, "
                    f"{theirs[name]!r} at rank {ready.rank}",
                    param="master.num_workers",
                )
    return msgspec.structs.replace(
        first,
        num_blocks=min(ready.num_blocks for ready in ranks),
        max_model_len=min(ready.max_model_len for ready in ranks),
        num_slots=min(ready.num_slots for ready in ranks),
        max_mappings=min(ready.max_mappings for ready in ranks),
        load_s=max(ready.load_s for ready in ranks),
    )


class RankResults:
    """Collects the results of a step from all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._steps: dict[int, dict[int, StepResult]] = {}
        self._frames: dict[int, list[bytes]] = {}

    @property
    def num_open(self) -> int:
        """Steps that some rank has given and another has not."""
        return len(self._steps)

    def add(
        self, rank: int, result: StepResult, frames: list[bytes]
    ) -> tuple[StepResult, list[bytes]] | None:
        """One rank's result; rank 0's and its frames once all ranks have given theirs. Raises
        EngineError where ranks do not agree: their sequences have gone apart."""
        given = self._steps.setdefault(result.step, {})
        given[rank] = result
        if rank == 0:
            self._frames[result.step] = frames
        if len(given) < self._num_ranks:
            return None
        del self._steps[result.step]
        frames = self._frames.pop(result.step)
        first = given[0]
        for other, theirs in given.items():
            if theirs.tokens != first.tokens or theirs.failed != first.failed:
                raise EngineError(f"ranks 0 and {other} disagree on step {result.step}")
        longest = max(one.duration_ns for one in given.values())
        return msgspec.structs.replace(first, duration_ns=longest), frames
