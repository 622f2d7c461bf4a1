"""Who gives up its blocks when there are not enough: decided from sort keys alone.

The victim is recomputed later from its tokens: offline before online, the lowest priority, the
latest arrival. A sequence with a step in flight is never chosen: its blocks are being written.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.master.sequence import Sequence, SequencePhase


def choose_victim(running: Iterable[Sequence]) -> Sequence | None:
    """The running sequence that can best wait; None if all have a step in flight."""
    victim: Sequence | None = None
    for seq in running:
        can_wait = seq.state is SequencePhase.RUNNING and not seq.num_in_flight
        if can_wait and (victim is None or seq.key > victim.key):
            victim = seq
    return victim
