"""From the last layer's output to tokens in their places, without the host.

All of it reads and writes tensors that stay, so that it can be captured behind the layers: the
numbers of a draw and the places of its tokens come up with those of the step. Rows of a batch's
padding are absent to the sampler, whatever their logits, and their tokens go to nobody's place.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from xllm.worker.execution.device.ops import DeviceDraws
from xllm.worker.execution.device.under_way import MAX_UNDER_WAY
from xllm.worker.graphs.choice import DrawKind
from xllm.worker.models.model import NativeModel

_NOBODYS = 2
"""Places in front of all others, of which the first is that of rows whose tokens nobody wants; two,
so that those behind begin at a multiple of 16 bytes (see `tensors`)."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepDraws:
    """What a step draws: of each row that is drawn from its `numbers` (int64 [rows, ROW_NUMBERS],
    of `DeviceDraws.prepare`) and the `places` (int64 [rows]) of their tokens."""

    numbers: NDArray[np.int64]
    places: NDArray[np.int64]
    kind: DrawKind


class DrawnTokens:
    """The last tokens of up to MAX_UNDER_WAY + 1 steps on the device, of `most` rows each: a
    later step finds them by place."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most + most % 2
        size = _NOBODYS + (MAX_UNDER_WAY + 1) * self.most
        self.flat = torch.zeros(size, dtype=torch.int64, device=device)
        """All places."""
        self._at = 0

    def next(self, count: int) -> tuple[int, torch.Tensor]:
        """The first place of the next step's tokens, and the tensor [count] that they go to."""
        self._at = (self._at + 1) % (MAX_UNDER_WAY + 1)
        first = _NOBODYS + self._at * self.most
        return first, self.flat[first : first + count]


class DeviceDrawing:
    """The head of one model and what draws from it."""

    def __init__(self, model: NativeModel, sampler: DeviceDraws, drawn: DrawnTokens) -> None:
        self._model = model
        self._sampler = sampler
        self.drawn = drawn
        device = drawn.flat.device
        self._tokens = torch.zeros(drawn.most, dtype=torch.int64, device=device)
        self._flags = torch.zeros(drawn.most, dtype=torch.uint8, device=device)

    def draw(
        self,
        hidden: torch.Tensor,
        read_rows: torch.Tensor,
        numbers: torch.Tensor,
        places: torch.Tensor,
        kind: DrawKind,
    ) -> None:
        """Launch the draw of a token from each of `read_rows` [rows] of `hidden`; see StepDraws.
        -1 where the model's output is not finite."""
        count = read_rows.shape[0]
        logits = self._model.head(hidden.index_select(0, read_rows))
        tokens, flags = self._tokens[:count], self._flags[:count]
        self._sampler.draw(logits, numbers, tokens, flags, filtered=kind is DrawKind.FILTERED)
        # What an absent row's token and flag are nobody knows: they are an older step's.
        self.drawn.flat.scatter_(0, places, tokens.masked_fill(flags != 0, -1))
