"""A decoder layer in the two parts that lie before and behind its attention.

Between attention and attention rows are treated alone, so that the number of rows is the only
dimension: what a partial graph holds. The state of the rows (the residual) is added to in place;
the sum that a half gives is added by the next norm, in one pass.
"""

from __future__ import annotations

import torch

from xllm.worker.execution.device.ops import DeviceOps, HeadNorms
from xllm.worker.layers.decoder import LayerWeights
from xllm.worker.layers.linear import Linear
from xllm.worker.layers.mlp import GatedMlp


class DeviceLayer:
    """Layer `index` of a model, computed by `ops` and the products of torch."""

    def __init__(self, index: int, weights: LayerWeights, ops: DeviceOps) -> None:
        self.index = index
        self._ops = ops
        self._weights = weights
        norms = weights.head_norms
        self._norms = None if norms is None else HeadNorms(*norms, weights.input_norm.eps)

    def before(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        row_addresses: torch.Tensor,
        positions: torch.Tensor,
        q_out: torch.Tensor,
    ) -> None:
        """Up to the attention: `x` [rows, hidden] is what the layer below adds to `residual`, None
        for the first. Queries go to `q_out`, keys and values to their places."""
        norm = self._weights.input_norm
        if x is None:
            normalised = self._ops.norm(residual, norm.weight, norm.eps)
        else:
            normalised = self._ops.add_norm(x, residual, norm.weight, norm.eps)
        qkv = self._weights.qkv(normalised)
        self._ops.place(self.index, qkv, self._norms, angles, row_addresses, positions, q_out)

    def behind(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """From the attention [rows, heads * head_dim] on: what the layer's feed-forward half adds
        to `residual`, which the attention's part is added to here."""
        norm = self._weights.output_norm
        added = self._weights.out(attended)
        normalised = self._ops.add_norm(added, residual, norm.weight, norm.eps)
        mlp = self._weights.mlp
        if isinstance(mlp, GatedMlp) and isinstance(mlp.gate_up, Linear):
            return mlp.down(self._ops.gate(mlp.gate_up(normalised)))
        return mlp(normalised)
