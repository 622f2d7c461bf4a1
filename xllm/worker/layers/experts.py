"""A feed-forward half of many gated MLPs, of which each row passes a few.

A router chooses the experts of each row; the rows are sorted by expert and all experts' products
are one grouped product. Experts are found through a table, logical number to the slot that holds
the weights, so that they can move and have spare slots; how many rows each expert got is counted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_STRIDE_BYTES = 16
"""What the grouped product of torch asks of the rows of its operands."""


class ExpertTables:
    """Where a model's experts are and how many rows they got, by layer and logical number.

    `slots` int64 [layers, experts]: the slot of each expert in its layer's weights (the identity
    until somebody writes to it). Invariant: the slots of a layer are distinct. `counts` int32
    [layers, experts]: rows since the last `take_counts`, zero for layers without experts.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.slots = torch.arange(num_experts, device=device).repeat(num_layers, 1)
        self.counts = torch.zeros((num_layers, num_experts), dtype=torch.int32, device=device)

    def take_counts(self) -> torch.Tensor:
        """The counts so far, which begin anew."""
        taken = self.counts.clone()
        self.counts.zero_()
        return taken


class SparseMlp:
    """The experts of layer `index`: `router` [experts, hidden], `gate_up` [slots, 2 * inner,
    hidden] with the gate's half first, `down` [slots, hidden, inner]. Each row passes the `top_k`
    experts of highest probability; `normalise`: their probabilities are made to sum to one."""

    def __init__(
        self,
        index: int,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        tables: ExpertTables,
        top_k: int,
        normalise: bool,
    ) -> None:
        self._index = index
        self._router = router
        self._gate_up = gate_up
        self._down = down
        self._tables = tables
        self._top_k = top_k
        self._normalise = normalise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] of any type to [rows, hidden] of the weights'; adds to the counts."""
        x = x.to(self._router.dtype)
        probabilities = F.linear(x, self._router).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self._top_k, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        flat = chosen.flatten()
        counts = self._tables.counts[self._index]
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        slots, order = self._tables.slots[self._index][flat].sort(stable=True)
        sizes = torch.zeros(len(self._down), dtype=torch.int32, device=x.device)
        ends = sizes.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32)).cumsum(
            0, dtype=torch.int32
        )
        gate, up = grouped_product(x[order // self._top_k], self._gate_up, ends).chunk(2, dim=-1)
        found = grouped_product(F.silu(gate) * up, self._down, ends)
        # Back in the rows' order; a row's parts are summed in the order of its own choice.
        parts = torch.empty_like(found).index_copy_(0, order, found)
        parts = parts.view(len(x), self._top_k, -1)
        return (parts.float() * weights.to(x.dtype)[..., None]).sum(dim=1).to(x.dtype)


def grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x W^T by groups of rows: the rows of x [rows, in] before ends[g] and not before ends[g - 1]
    meet weights[g] of [groups, out, in]; gives [rows, out]. `ends` int32 [groups]."""
    aligned = all(y.stride(-2) * y.element_size() % _STRIDE_BYTES == 0 for y in (x, weights))
    if aligned and (x.device.type == "cpu" or x.dtype == torch.bfloat16):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    return grouped_product_by_group(x, weights, ends)


def grouped_product_by_group(
    x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The same, one group after the other, for shapes and devices that torch has no grouped
    product for."""
    out = torch.empty((len(x), weights.shape[1]), dtype=x.dtype, device=x.device)
    first = 0
    for group, end in enumerate(ends.tolist()):
        if end > first:
            torch.mm(x[first:end], weights[group].T, out=out[first:end])
        first = end
    return out
