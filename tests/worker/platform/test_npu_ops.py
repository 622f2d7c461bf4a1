"""The fused operators of an NPU, played on the CPU: called as they are documented, and in their
places in a model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver
from tests.worker.platform.device_api import npu_facts, npu_versions
from tests.worker.platform.npu_op_stand_ins import NpuOpStandIns, parameters_of
from xllm.worker.attention import paged
from xllm.worker.execution import reading
from xllm.worker.layers.norm import RmsNorm
from xllm.worker.layers.rotary import Rotary
from xllm.worker.loader.config import RopeConfig
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.npu_ops import NpuOps

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(params=npu_versions())
def module(request) -> NpuOpStandIns:
    return NpuOpStandIns(request.param)


@pytest.fixture
def ops(module) -> NpuOps:
    return NpuOps(module, CPU)


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=generator).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_norms(ops, dtype) -> None:
    x = random(5, 7, 32, dtype=dtype)
    for weight in (random(32, dtype=dtype), random(7, 32, dtype=dtype)):
        close(RmsNorm(weight, 1e-5, ops)(x), RmsNorm(weight, 1e-5)(x))
    flat = random(3, 32, dtype=dtype)
    close(RmsNorm(weight[0], 1e-6, ops)(flat), RmsNorm(weight[0], 1e-6)(flat))


def test_gating(ops) -> None:
    gate_up = random(6, 40)
    gate, up = gate_up.chunk(2, -1)
    close(ops.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("factor", "is_fused"), [(1.0, True), (1.2, False)])
def test_rotation(ops, module, factor, is_fused) -> None:
    config = RopeConfig(theta=1e4, attention_factor=factor)
    positions = torch.tensor([0, 1, 5, 900])
    x = random(4, 3, 16)
    by_ops = Rotary(config, 16, CPU, ops).tables(positions, BF16).rotate(x)
    close(by_ops, Rotary(config, 16, CPU).tables(positions, BF16).rotate(x))
    assert module.calls["npu_rotary_mul"] == is_fused


def reference(q, k, v, hidden, scale) -> torch.Tensor:
    seen = None if hidden is None else ~hidden
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=seen, is_causal=hidden is None, scale=scale, enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "rows", "tokens", "masked"),
    [(3, 1, 9, True), (1, 5, 12, True), (2, 6, 6, False), (2, 1, 1, False), (1, 2100, 2100, False)],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_attention(ops, batch, rows, tokens, masked, heads, kv_heads) -> None:
    q = random(batch, rows, heads, 16)
    k, v = random(batch, tokens, kv_heads, 16), random(batch, tokens, kv_heads, 16).flip(1)
    hidden = None
    if masked:
        own = torch.arange(tokens - rows, tokens)[:, None]
        hidden = (torch.arange(tokens) > own).expand(batch, 1, rows, tokens).clone()
        hidden[0, :, :, :3] = True
    assert ops.can_attend(q, k)
    close(ops.attend(q, k, v, hidden, 0.3), reference(q, k, v, hidden, 0.3))


@pytest.mark.parametrize(
    ("shape", "kv_heads", "dtype"),
    [
        ((1, 2, 4, 16), 4, torch.float32),
        ((1, 2, 4, 24), 4, BF16),
        ((1, 2, 4, 528), 4, BF16),
        ((1, 2, 300, 16), 4, BF16),
        ((1, 2, 130, 16), 2, BF16),
        ((1, 2, 130, 512), 65, BF16),
    ],
)
def test_what_the_operator_does_not_take(ops, shape, kv_heads, dtype) -> None:
    q = torch.zeros(shape, dtype=dtype)
    k = torch.zeros((shape[0], 9, kv_heads, shape[3]), dtype=dtype)
    assert not ops.can_attend(q, k)


def test_every_version_has_what_the_stand_ins_play() -> None:
    for version, name in itertools.product(
        npu_versions(),
        ("npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fused_infer_attention_score"),
    ):
        known = [fact["name"] for fact in npu_facts(version)["operators"][name]]
        assert set(parameters_of(name)) <= set(known), (version, name)


def test_wrong_calls_are_found(module) -> None:
    x = random(2, 8)
    with pytest.raises(TypeError, match="eps"):
        module.npu_rms_norm(x, x[0], eps=1e-5)
    with pytest.raises(TypeError, match="is no float"):
        module.npu_rms_norm(x, x[0], epsilon="small")
    with pytest.raises(AttributeError, match="npu_nothing"):
        module.npu_nothing(x)


class WithOps(CpuPlatform):
    """A CPU whose back-end has an NPU's operators."""

    def __init__(self, ops: NpuOps) -> None:
        super().__init__()
        self._ops = ops

    def back_end_ops(self) -> NpuOps:  # type: ignore[override]
        return self._ops


PROMPTS = [list(range(5, 5 + n)) for n in (1, 17, 60)]


@pytest.mark.parametrize("model", ["qwen3", "mistral-window"])
def test_a_model_computes_with_them(model, tmp_path: Path, monkeypatch) -> None:
    """Fresh prompts, chunks behind a prefix, decodes of several lengths, windows: the logits are
    those of torch but for rounding, and everything went through the operators."""
    directory = make_model(model, tmp_path)
    module = NpuOpStandIns(npu_versions()[-1])
    found = {}
    for name in ("torch", "ops"):
        if name == "ops":
            platform = WithOps(NpuOps(module, CPU))
            monkeypatch.setattr(reading, "select_platform", lambda *args: platform)
            monkeypatch.setattr(paged.F, "scaled_dot_product_attention", refused)
        driver = PlanDriver(directory, kernels="torch", dtype="float16")
        jobs = [driver.job(prompt, 6) for prompt in PROMPTS]
        driver.generate(jobs, chunk=23)
        found[name] = [job.output for job in jobs]
        driver.executor.close()
    assert set(module.calls) == {
        "npu_rms_norm", "npu_swiglu", "npu_rotary_mul", "npu_fused_infer_attention_score",
    }  # fmt: skip
    assert all(module.calls.values())
    assert found["ops"] == found["torch"]


def refused(*args: object, **kwargs: object) -> torch.Tensor:
    raise AssertionError("torch's own attention was asked")
