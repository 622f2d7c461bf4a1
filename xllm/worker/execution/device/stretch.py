"""The tensors that the graphs of a model leave things in, for each other and for attention."""

from __future__ import annotations

import torch

from xllm.worker.loader.config import ModelConfig

Angles = tuple[torch.Tensor, torch.Tensor]


class StretchTensors:
    """What graphs leave for each other and for attention between them, for `most` rows."""

    def __init__(
        self, config: ModelConfig, most: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads = (most, config.num_heads, config.head_dim)
        state = (most, config.hidden_size)
        self.q = torch.zeros(heads, dtype=dtype, device=device)
        self.attended = torch.zeros(heads, dtype=dtype, device=device)
        self.hidden = torch.zeros(state, dtype=dtype, device=device)
        self._even = torch.zeros(state, dtype=dtype, device=device)
        self._odd = torch.zeros(state, dtype=dtype, device=device)
        half = (2, most, config.head_dim // 2)
        self._angles = torch.zeros(half, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        states = (self.q, self.attended, self.hidden, self._even, self._odd, self._angles)
        return sum(state.nbytes for state in states)

    def sides(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' state as stretch `number` finds it and where it leaves it."""
        return (self._even, self._odd) if number % 2 else (self._odd, self._even)

    def angles(self, rows: int) -> Angles:
        """Cosines and sines of the rows."""
        return self._angles[0, :rows], self._angles[1, :rows]
