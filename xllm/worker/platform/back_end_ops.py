"""What a device's torch back-end has in one piece, where torch itself takes several operators."""

from __future__ import annotations

from typing import Protocol

import torch


class BackEndOps(Protocol):
    """Operators in one piece. Where they round is the back-end's own. None of them waits."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last axis. `weight`: of that axis, or of more of x's last
        axes, which are not summed over then."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up [rows, inner] of [rows, 2 * inner], the gate's half first."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, head_dim] * cos + (-second half, first half) * sin, which are
        [rows, 1, head_dim], numbers from -1 to 1 of x's type."""

    def can_attend(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether `attend` takes such queries and keys."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of q [batch, rows, heads, head_dim], in that shape, over k and v [batch,
        tokens, kv_heads, head_dim]. `hidden`: bool [batch or 1, 1, rows, tokens], True for keys
        that a row does not see; None: it is causal over as many tokens as rows."""
