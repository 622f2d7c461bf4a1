"""Without the library: why there is none is said, and torch computes over the same packed data."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from xllm.worker.kernels.compiled import load, load_from
from xllm.worker.kernels.linear import Epilogue, pack_gate_up, pack_linear
from xllm.worker.kernels.packing import Kind


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler: torch computes")
def test_where_there_is_a_compiler_the_kernels_are_built():
    """Their extension is optional: an installation that could not build them says nothing."""
    assert load().compiled is not None, load().reason


@pytest.mark.skipif(load().compiled is None, reason=load().reason)
def test_no_variant_of_this_cpu_is_wrong():
    """One that fails its check at load is not used, and nothing else would tell."""
    assert [variant.name for variant in load().compiled.variants if variant.wrong] == []


def test_a_missing_library_has_a_reason(tmp_path):
    loaded = load_from(tmp_path)
    assert loaded.compiled is None
    assert "not built" in loaded.reason


def test_a_broken_library_has_a_reason(tmp_path):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    loaded = load_from(tmp_path)
    assert loaded.compiled is None
    assert loaded.reason


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.FP32])
def test_the_twin_computes(kind):
    weight, bias = torch.randn(21, 13).bfloat16(), torch.randn(21)
    linear = pack_linear(kind, weight, bias, None)
    x = torch.randn(4, 13)
    expected = F.linear(x, weight.float(), bias)
    torch.testing.assert_close(linear(x), expected)
    out = torch.ones(4, 21)
    linear(x, Epilogue.ADD, out)
    torch.testing.assert_close(out, expected + 1)
    assert linear.num_bytes >= 21 * 13 * weight.element_size()
    gate, up = torch.randn(21, 13).bfloat16(), torch.randn(21, 13).bfloat16()
    gated = pack_gate_up(kind, gate, up, None)
    expected = F.silu(F.linear(x, gate.float())) * F.linear(x, up.float())
    torch.testing.assert_close(gated(x, Epilogue.SILU_MUL), expected)


def test_epilogues_that_do_not_fit_are_errors():
    linear = pack_linear(Kind.FP32, torch.ones(4, 4), None, None)
    with pytest.raises(ValueError, match="gated"):
        linear(torch.ones(1, 4), Epilogue.SILU_MUL)
    with pytest.raises(ValueError, match="out"):
        linear(torch.ones(1, 4), Epilogue.ADD)
