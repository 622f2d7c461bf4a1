"""The experts of a layer over packed weights: router, choice, gated MLPs and their weighted sum in
one call of the compiled kernels, or in torch over the same packed data.

A row's result does not depend on the other rows of the call: see cpu/experts.h. (The twin has no
such promise.)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from xllm.errors import EngineError
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.kernels.packing import BLOCK, Kind, num_blocks
from xllm.worker.kernels.structures import CExperts
from xllm.worker.kernels.team import Team

NO_SUCH_SLOT = -2  # cpu/layer_api.cpp


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """`num_slots` places for the weights of `num_experts` gated MLPs, [hidden] to [inner] and
    back. Each row passes the `top_k` of highest probability; `normalise`: their probabilities are
    made to sum to one."""

    num_experts: int
    num_slots: int
    top_k: int
    normalise: bool
    hidden: int
    inner: int


class PackedExperts:
    """Zeros, for `place` of `router`, `gate_up` and `down`, which hold the slots one behind the
    other. `slots` int64 [experts]: the slot of each expert; `counts` int32 [experts]: the rows
    that it got are added. Both are read and written where they are; several experts may be in one
    slot. `kind`: of the experts' weights; `variant`: see PackedLinear."""

    def __init__(
        self,
        kind: Kind,
        router_kind: Kind,
        sizes: ExpertSizes,
        slots: torch.Tensor,
        counts: torch.Tensor,
        team: Team | None,
        variant: int = 0,
    ) -> None:
        assert slots.dtype == torch.int64
        assert counts.dtype == torch.int32
        assert len(slots) == len(counts) == sizes.num_experts
        assert slots.is_contiguous()
        assert counts.is_contiguous()
        self.sizes = sizes
        self.slots, self.counts = slots, counts
        self.inner_blocks, self.hidden_blocks = num_blocks(sizes.inner), num_blocks(sizes.hidden)
        """Blocks of gate, of up and of down in a slot."""
        hidden, inner, num_slots = sizes.hidden, sizes.inner, sizes.num_slots
        self.router = PackedLinear(router_kind, sizes.num_experts, hidden, team, variant=variant)
        outputs = 2 * num_slots * self.inner_blocks * BLOCK
        self.gate_up = PackedLinear(kind, outputs, hidden, team, gated=True, variant=variant)
        outputs = num_slots * self.hidden_blocks * BLOCK
        self.down = PackedLinear(kind, outputs, inner, team, variant=variant)
        self._team = team
        self._experts = CExperts(
            router=self.router.c_weight,
            gate_up=self.gate_up.c_weight,
            down=self.down.c_weight,
            slots=slots.data_ptr(),
            counts=counts.data_ptr(),
            num_experts=sizes.num_experts,
            num_slots=num_slots,
            top_k=sizes.top_k,
            normalise=sizes.normalise,
            hidden=hidden,
            inner=inner,
        )

    @property
    def address(self) -> int:
        """Of the experts as C++ has them; valid while this object lives."""
        return ctypes.addressof(self._experts)

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return self.router.num_bytes + self.gate_up.num_bytes + self.down.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] of any type to float32 [rows, hidden]; adds to the counts. EngineError
        where the table names a slot that there is not."""
        x = x.float().contiguous()
        if self._team is None:
            return self.twin(x)
        c, team, experts = self._team.compiled.c, self._team, ctypes.byref(self._experts)
        out = torch.empty_like(x)
        scratch = team.scratch(c.xk_experts_scratch(team.handle, experts, len(x)))
        failed = c.xk_experts(team.handle, experts, x.data_ptr(), len(x), out.data_ptr(), scratch)
        self.refuse(failed)
        return out

    def refuse(self, failed: int) -> None:
        """EngineError where what a kernel gave says that the table is wrong."""
        if failed == NO_SUCH_SLOT:
            raise EngineError(
                f"the table of experts names slots outside of 0 to {self.sizes.num_slots - 1}: "
                f"{self.slots.tolist()}"
            )

    def twin(self, x: torch.Tensor) -> torch.Tensor:
        """The same in torch, x float32, one expert after the other."""
        sizes = self.sizes
        shares = self.router.twin(x).softmax(dim=-1)
        # A stable sort: of equal experts the first, as the kernel has it.
        shares, chosen = shares.sort(dim=-1, descending=True, stable=True)
        shares, chosen = shares[:, : sizes.top_k], chosen[:, : sizes.top_k]
        if sizes.normalise:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        self.counts += chosen.flatten().bincount(minlength=sizes.num_experts).int()
        out = torch.zeros_like(x)
        for expert, slot in enumerate(self.slots.tolist()):
            rows, choices = (chosen == expert).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, self._twin(x[rows], slot) * shares[rows, choices, None])
        return out

    def _twin(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        inner, hidden = 2 * self.inner_blocks, self.hidden_blocks
        wide = self.gate_up.twin(x, slice(slot * inner, (slot + 1) * inner))
        narrow = wide[:, : self.sizes.inner].contiguous()
        found = self.down.twin(narrow, slice(slot * hidden, (slot + 1) * hidden))
        return found[:, : self.sizes.hidden]
