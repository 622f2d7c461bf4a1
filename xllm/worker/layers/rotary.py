"""Rotary position embedding (Su et al., 2021) with the published ways to stretch it.

Frequencies are made once, in fp32; the cosines and sines of a step's positions once a step. The
two halves of a head are the two coordinates of its pairs (the layout of Hugging Face weights).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from xllm.worker.loader.config import RopeConfig
from xllm.worker.platform.back_end_ops import BackEndOps


@dataclasses.dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sin of a step's rows, each [rows, 1, head_dim]; the sign of the first half's
    rotation is in `sin`, but where `ops` rotate."""

    cos: torch.Tensor
    sin: torch.Tensor
    ops: BackEndOps | None = None

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [rows, heads, head_dim] by its rows' positions."""
        if self.ops is not None:
            return self.ops.rotate(x, self.cos, self.sin)
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((second, first), dim=-1) * self.sin


class Rotary:
    """The frequencies of a model, and tables for positions."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        device: torch.device,
        ops: BackEndOps | None = None,
    ) -> None:
        frequencies = rotary_frequencies(config, head_dim)
        self._frequencies = frequencies.to(device)
        self._scale = config.attention_factor
        # Operators are given cosines and sines as they are, which a factor may take beyond 1.
        self._ops = ops if self._scale == 1.0 else None

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
        """The tables of `positions` [rows] (int64), in `dtype`."""
        cos, sin = self.angles(positions)
        first = -sin if self._ops is None else sin
        return RotaryTables(
            torch.cat((cos, cos), dim=-1).to(dtype)[:, None, :],
            torch.cat((first, sin), dim=-1).to(dtype)[:, None, :],
            self._ops,
        )

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `positions` [rows] (int64), each fp32 [rows, head_dim / 2]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        return angles.cos() * self._scale, angles.sin() * self._scale


def rotary_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position for each of head_dim / 2 pairs, fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / config.theta**exponents
    match config.kind:
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3(config, plain)
        case "yarn":
            return _yarn(config, plain, head_dim)
    return plain


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by the factor, short ones kept, those between blended."""
    rotations = config.original_max_positions * plain / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / config.factor + kept * plain


def _yarn(config: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al., 2023): pairs that turn more than beta_fast times over the original
    context are kept, those that turn less than beta_slow times slowed, a ramp between."""

    def pair_that_turns(times: float) -> float:
        ratio = config.original_max_positions / (times * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    first, last = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = max(last - first, 0.001)
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / span).clamp(0.0, 1.0)
    return plain / config.factor * slowed + plain * (1.0 - slowed)
