"""Norms and gates against the layers that torch computes, with their roundings."""

import pytest
import torch
import torch.nn.functional as F

from tests.worker.triton_interpreter import DEVICE
from xllm.errors import InvariantError
from xllm.worker.layers.norm import RmsNorm
from xllm.worker.triton_kernels.activation import silu_mul
from xllm.worker.triton_kernels.norm import add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def rows(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def compare(found, wanted):
    """Equal but for a rounding of the last place."""
    near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[wanted.dtype]
    torch.testing.assert_close(found, wanted, atol=near, rtol=near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 40, 1024])
def test_a_norm_is_that_of_the_layers(dtype, columns):
    x, weight = rows(5, columns, dtype=dtype), rows(columns, dtype=dtype, seed=1)
    kept = x.clone()
    compare(rms_norm(x, weight, EPS), RmsNorm(weight, EPS)(x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 40, 1024])
def test_the_residual_is_added_in_place(dtype, columns):
    x, residual = rows(5, columns, dtype=dtype), rows(5, columns, dtype=dtype, seed=2)
    weight = rows(columns, dtype=dtype, seed=1)
    total = residual + x
    found = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    compare(found, RmsNorm(weight, EPS)(total))


def test_a_row_of_zeros_stays_finite():
    x = torch.zeros((2, 16), device=DEVICE)
    assert torch.equal(rms_norm(x, torch.ones(16, device=DEVICE), EPS), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [8, 40, 1500])
def test_a_gate_is_that_of_the_layers(dtype, inner):
    gate_up = rows(3, 2 * inner, dtype=dtype) * 4
    gate, up = gate_up.chunk(2, dim=-1)
    compare(silu_mul(gate_up), F.silu(gate) * up)


def test_no_rows_are_no_work():
    empty = torch.empty((0, 32), device=DEVICE)
    weight = torch.ones(32, device=DEVICE)
    assert rms_norm(empty, weight, EPS).shape == (0, 32)
    assert add_rms_norm(empty, empty.clone(), weight, EPS).shape == (0, 32)
    assert silu_mul(empty).shape == (0, 16)


def test_tensors_that_are_not_contiguous_are_refused():
    x, weight = rows(4, 32, dtype=torch.float32), torch.ones(16, device=DEVICE)
    with pytest.raises(InvariantError, match="x is not contiguous"):
        rms_norm(x[:, ::2], weight, EPS)
    with pytest.raises(InvariantError, match="residual is not contiguous"):
        add_rms_norm(x[:, :16].contiguous(), x[:, ::2], weight, EPS)
    with pytest.raises(InvariantError, match="gate_up is not contiguous"):
        silu_mul(x[:, ::2])
