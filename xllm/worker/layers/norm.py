"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xllm.worker.platform.back_end_ops import BackEndOps


class RmsNorm:
    """x / rms(x) * weight over the last axis, the mean in fp32."""

    __slots__ = ("_ops", "eps", "weight")

    def __init__(self, weight: torch.Tensor, eps: float, ops: BackEndOps | None = None) -> None:
        self.weight = weight
        self.eps = eps
        self._ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as x."""
        if self._ops is not None:
            return self._ops.rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight
        # The normalised values are rounded before the weight is applied, as the models
        # were trained.
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight
