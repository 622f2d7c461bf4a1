"""The gated MLP of Llama-like models: down(silu(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xllm.worker.kernels.linear import Epilogue, PackedLinear
from xllm.worker.layers.linear import Linear
from xllm.worker.platform.back_end_ops import BackEndOps


class GatedMlp:
    """`gate_up` gives [rows, 2 * intermediate], the gate's half first; packed, it is gated and
    gives silu(gate) * up."""

    __slots__ = ("_ops", "down", "gate_up")

    def __init__(
        self,
        gate_up: Linear | PackedLinear,
        down: Linear | PackedLinear,
        ops: BackEndOps | None = None,
    ) -> None:
        self.gate_up = gate_up
        self.down = down
        self._ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, hidden]."""
        if isinstance(self.gate_up, PackedLinear):
            return self.down(self.gate_up(x, Epilogue.SILU_MUL))
        if self._ops is not None:
            return self.down(self._ops.silu_mul(self.gate_up(x)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
