"""The fused operators of torch_npu, by their published schemas and constraints.

`tests/worker/platform/npu_api.json` has the schemas; the constraints are those of the operators'
documentation in torch_npu (`_op_plugin_docs.py`). None of this has run on an NPU.
"""

from __future__ import annotations

from typing import Any

import torch

_HALF_TYPES = (torch.float16, torch.bfloat16)
_MAX_HEADS = 256
_MAX_HEAD_DIM = 512
_HEAD_DIM_STEP = 16
_MAX_GROUP = 64
_MAX_ROW = 65_535
"""Numbers of all heads of a token, in the layout that attention is given."""

_DEFAULT_MASK = 0
_RIGHT_DOWN_CAUSAL = 3
_CAUSAL_SIZE = 2048
"""Of the one mask that stands for every causal one."""


class NpuOps:
    """Implements BackEndOps. `api` is the module torch_npu."""

    def __init__(self, api: Any, device: torch.device) -> None:
        self._api = api
        self._device = device
        self._causal: torch.Tensor | None = None
        self._ones: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See BackEndOps."""
        if weight.ndim == 1:
            return self._normed(x, weight, eps)
        # The operator sums over as many axes as its weight has.
        key = x.shape[-1], x.dtype
        if key not in self._ones:
            self._ones[key] = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        return self._normed(x, self._ones[key], eps) * weight

    def _normed(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed: torch.Tensor = self._api.npu_rms_norm(x, weight, epsilon=eps)[0]
        return normed

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See BackEndOps."""
        gated: torch.Tensor = self._api.npu_swiglu(gate_up, dim=-1)
        return gated

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See BackEndOps."""
        # As one sequence: [1, rows, heads, head_dim] by [1, rows, 1, head_dim].
        rotated: torch.Tensor = self._api.npu_rotary_mul(x[None], cos[None], sin[None])
        return rotated[0]

    def can_attend(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """See BackEndOps."""
        heads, kv_heads, dim = q.shape[2], k.shape[2], q.shape[3]
        return (
            q.dtype in _HALF_TYPES
            and heads <= _MAX_HEADS
            and heads // kv_heads <= _MAX_GROUP
            and dim <= _MAX_HEAD_DIM
            and dim % _HEAD_DIM_STEP == 0
            and heads * dim < _MAX_ROW
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """See BackEndOps. Lengths stand in the mask, not in lists of the host, so that nothing of
        a step's lengths is fixed where the call is recorded."""
        is_causal = hidden is None and q.shape[1] > 1
        found: torch.Tensor = self._api.npu_fused_infer_attention_score(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            atten_mask=self._causal_mask() if is_causal else hidden,
            num_heads=q.shape[2],
            num_key_value_heads=k.shape[2],
            scale=scale,
            input_layout="BSND",
            sparse_mode=_RIGHT_DOWN_CAUSAL if is_causal else _DEFAULT_MASK,
        )[0]
        return found

    def _causal_mask(self) -> torch.Tensor:
        if self._causal is None:
            shape = (_CAUSAL_SIZE, _CAUSAL_SIZE)
            mask = torch.ones(shape, dtype=torch.bool, device=self._device)
            self._causal = mask.triu_(1)
        return self._causal
