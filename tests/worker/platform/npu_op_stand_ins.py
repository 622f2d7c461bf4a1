"""Stands in for the module torch_npu: its operators by their documented formulas, on the CPU.

Each refuses what the documentation of torch_npu 2.14 says that the real one refuses, and parameters
that the schemas in `npu_api.json` do not have. What the real ones do beside that is not known here.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.worker.platform.device_api import npu_facts, signature_of

HALF = (torch.float16, torch.bfloat16)


class NpuOpStandIns:
    """The module; `calls` counts what was called."""

    def __init__(self, version: str) -> None:
        self._facts = npu_facts(version)["operators"]
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self._facts:
            raise AttributeError(f"torch_npu has no {name}, or its facts were not kept")
        signature = signature_of(self._facts[name])
        types = {fact["name"]: fact["type"] for fact in self._facts[name]}
        compute = getattr(self, f"_{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            for parameter, value in bound.arguments.items():
                check_type(types[parameter], value)
            self.calls[name] += 1
            given = {f"{key}_" if key == "self" else key: v for key, v in bound.arguments.items()}
            return compute(**given)

        return call

    def _npu_rms_norm(
        self, self_: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert 2 <= self_.ndim <= 8
        assert self_.dtype == gamma.dtype
        axes = tuple(range(-gamma.ndim, 0))
        assert self_.shape[-gamma.ndim :] == gamma.shape
        rstd = self_.float().square().mean(axes, keepdim=True).add(epsilon).rsqrt()
        return (self_.float() * rstd * gamma.float()).to(self_.dtype), rstd

    def _npu_swiglu(self, self_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        gate, up = self_.float().chunk(2, dim)
        return (gate * gate.sigmoid() * up).to(self_.dtype)

    def _npu_rotary_mul(
        self, self_: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half"
    ) -> torch.Tensor:
        batch, rows, heads, dim = self_.shape
        assert batch < 1000
        assert heads < 1000
        assert dim < 896
        assert dim % 2 == 0
        assert rotary_mode == "half"
        for table in (r1, r2):
            assert table.shape == (1, rows, 1, dim)
            assert table.dtype == self_.dtype
            assert table.abs().max() <= 1
        first, second = self_.chunk(2, -1)
        return r1 * self_ + r2 * torch.cat((-second, first), -1)

    def _npu_fused_infer_attention_score(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        atten_mask: torch.Tensor | None = None,
        num_heads: int = 1,
        num_key_value_heads: int = 0,
        scale: float = 1.0,
        input_layout: str = "BSH",
        sparse_mode: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert input_layout == "BSND"
        batch, rows, heads, dim = query.shape
        tokens, kv_heads = key.shape[1:3]
        assert (heads, kv_heads) == (num_heads, num_key_value_heads or num_heads)
        assert key.shape == value.shape == (batch, tokens, kv_heads, dim)
        assert heads % kv_heads == 0
        assert heads // kv_heads <= 64
        assert dim <= 512
        assert rows == 1 or dim % 16 == 0
        assert heads * dim < 65_535
        for tensor in (query, key, value):
            assert tensor.is_contiguous()
            assert tensor.dtype in HALF
            assert tensor.dtype == query.dtype
        masked = self._masked(atten_mask, sparse_mode, batch, rows, tokens)
        q = query.transpose(1, 2).float()
        k = key.transpose(1, 2).float().repeat_interleave(heads // kv_heads, 1)
        v = value.transpose(1, 2).float().repeat_interleave(heads // kv_heads, 1)
        scores = q @ k.transpose(2, 3) * scale
        weights = scores.masked_fill(masked, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).to(query.dtype).contiguous(), torch.zeros(1)

    def _masked(
        self, mask: torch.Tensor | None, mode: int, batch: int, rows: int, tokens: int
    ) -> torch.Tensor:
        """[batch or 1, 1, rows, tokens]: what is not seen."""
        if rows == 1:
            assert mode == 0, "the mode means nothing here"
        if mask is None:
            assert mode == 0
            return torch.zeros((1, 1, rows, tokens), dtype=torch.bool)
        assert mask.is_contiguous()
        assert mask.dtype in (torch.bool, torch.int8, torch.uint8)
        if mode == 3:
            assert mask.shape == (2048, 2048)
            assert torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
            own = torch.arange(tokens - rows, tokens)[:, None]
            return (torch.arange(tokens) > own)[None, None]
        assert mode == 0
        assert mask.shape in ((batch, 1, rows, tokens), (1, 1, rows, tokens))
        return mask.bool()


KINDS = {
    "Tensor": torch.Tensor,
    "float": float,
    "int": int,
    "str": str,
    "bool": bool,
    "SymInt[]": (list, tuple),
}


def check_type(type_: str, value: Any) -> None:
    """TypeError where a schema's type does not take a value."""
    if type_.endswith("?"):
        if value is None:
            return
        type_ = type_[:-1]
    kind = KINDS[type_]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is no {type_}")


def parameters_of(name: str) -> list[str]:
    """What a stand-in takes, but for `self`: so many of the real one's parameters are played."""
    function = getattr(NpuOpStandIns, f"_{name}")
    return [key.removesuffix("_") for key in inspect.signature(function).parameters][1:]
