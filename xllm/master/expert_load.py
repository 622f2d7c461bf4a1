"""How evenly a model's experts are used: counts of steps as a report for heartbeats.

Pure. A report says, of each layer that has experts, how much more its busiest one had to do than
one of them on the average, and which ones are busiest. Older steps count less: what was counted is
halved about every seven reports that say something new.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from xllm.errors import BadMessageError
from xllm.protocol.bus import MAX_EXPERT_LOAD_BYTES
from xllm.protocol.step import StepResult

KEPT = 0.9
"""Of what was counted before a report, how much counts in the next."""
NUM_HOTTEST = 4
_COUNT_BYTES = 4


class ExpertLoad:
    """Of one model with `num_experts` experts a layer; 0: it has none, and nothing is reported."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._counts: npt.NDArray[np.float64] | None = None
        self._is_fresh = False

    def note(self, result: StepResult, frames: Sequence[bytes]) -> None:
        """Add what a step gave each expert, [layers, experts], where its result says so.
        BadMessageError, and nothing is added, for a frame of another size."""
        if not result.expert_frames or not self._num_experts:
            return  # an older worker counts, and does not say how many there are
        place = 3 if result.num_top >= 0 else 0
        frame = frames[place] if len(frames) > place else b""
        row = self._num_experts * _COUNT_BYTES
        wanted = len(frame) if self._counts is None else self._counts.size * _COUNT_BYTES
        if not frame or len(frame) % row or len(frame) != wanted:
            raise BadMessageError(
                f"step {result.step}: counts of {self._num_experts} experts a layer cannot have "
                f"{len(frame)} bytes"
            )
        counts = np.frombuffer(frame, "<i4").reshape(-1, self._num_experts)
        if self._counts is None:
            self._counts = np.zeros(counts.shape)
        self._counts += counts
        self._is_fresh = True

    def report(self) -> bytes:
        """A JSON object of MAX_EXPERT_LOAD_BYTES at most, or nothing where no step was counted
        since the last one: `experts` of a layer; `layers`, the most uneven ones first, each as
        [layer, rows of its busiest expert against the mean, the busiest experts];
        `num_left_out`, layers for which there was no room."""
        if self._counts is None or not self._is_fresh:
            return b""
        self._is_fresh = False
        counts, self._counts = self._counts, self._counts * KEPT
        layers = [_layer(index, row) for index, row in enumerate(counts) if row.any()]
        layers.sort(key=lambda layer: -layer[1])
        num_left_out = 0
        while True:
            value = {
                "experts": self._num_experts,
                "layers": layers[: len(layers) - num_left_out],
                "num_left_out": num_left_out,
            }
            report = msgspec.json.encode(value)
            if len(report) <= MAX_EXPERT_LOAD_BYTES or num_left_out == len(layers):
                return report
            num_left_out += 1


def _layer(index: int, counts: npt.NDArray[np.float64]) -> tuple[int, float, list[int]]:
    busiest = np.argsort(-counts, kind="stable")[:NUM_HOTTEST]
    return index, round(float(counts.max() / counts.mean()), 2), [int(one) for one in busiest]
