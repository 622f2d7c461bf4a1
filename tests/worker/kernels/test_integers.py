"""Products of quantized weights: every variant gives the bits of the twin, whatever shares the
call; the rounding stays within its bounds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.integers import (
    GROUPS,
    multiply_integers,
    pack_integers,
    round_inputs,
    unpack_integers,
)
from xllm.worker.kernels.linear import Epilogue, PackedLinear, Part, pack_gate_up, pack_linear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team

LIBRARY = load().compiled
USABLE = [v for v in LIBRARY.variants if v.usable and v.number < 4] if LIBRARY else []
# The best one (0) may be one that no number names, AVX-512 VNNI; -1 is plain C++.
VARIANTS = {"plain": -1} | {v.name: v.number for v in USABLE}
needs_library = pytest.mark.skipif(LIBRARY is None, reason=load().reason)
per_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
per_kind = pytest.mark.parametrize("kind", list(GROUPS))

WEIGHT_ERROR = {Kind.INT8: 0.012, Kind.INT4: 0.12, Kind.W8A8: 0.02}
"""Relative errors of products of normally distributed numbers, at most."""


@pytest.fixture(scope="module", params=[1, 3])
def team(request):
    team = Team(LIBRARY, request.param)
    yield team
    team.close()


def tensors(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@needs_library
@per_variant
@per_kind
def test_every_row_count_and_odd_shapes(team, kind, variant):
    for n, k in [(1, 1), (16, 64), (33, 37), (80, 130), (48, 1055), (7, 4500)]:
        weight, bias = tensors(n, k, seed=n, dtype=torch.bfloat16), tensors(n, seed=k)
        linear = pack_linear(kind, weight, bias, team, variant)
        for rows in [*range(8), 11, 12, 13, 25, 47, 131]:
            x = tensors(rows, k, seed=rows)
            assert torch.equal(linear(x), linear.twin(x)), (n, k, rows)


@needs_library
@per_variant
@per_kind
def test_epilogues_and_strides(team, kind, variant):
    for half, k in [(5, 33), (40, 200)]:
        gate, up = tensors(half, k, seed=1), tensors(half, k, seed=2)
        gated = pack_gate_up(kind, gate, up, team, variant)
        gated.place_bias(tensors(half, seed=3), 0, 2)
        gated.place_bias(tensors(half, seed=4), 1, 2)
        plain = pack_linear(kind, up, None, team, variant)
        for rows in (1, 9, 35):
            x = tensors(rows, k + 9, seed=rows)[:, 3 : 3 + k]
            got = gated(x, Epilogue.SILU_MUL)
            torch.testing.assert_close(got, gated.twin(x), rtol=1e-5, atol=1e-5)
            out = tensors(rows, half + 5, seed=6)
            before = out.clone()
            plain(x, Epilogue.ADD, out[:, 2 : 2 + half])
            assert torch.equal(out[:, 2 : 2 + half], before[:, 2 : 2 + half] + plain.twin(x))
            assert torch.equal(out[:, :2], before[:, :2])
            assert torch.equal(out[:, 2 + half :], before[:, 2 + half :])


@needs_library
@per_variant
@per_kind
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 2200),
    rows=st.integers(2, 140),
    start=st.integers(0, 139),
    count=st.integers(1, 140),
)
def test_a_row_has_the_same_bits_in_every_batch(kind, variant, n, k, rows, start, count):
    weight, x = tensors(n, k, seed=n), tensors(rows, k, seed=k)
    first, second = Team(LIBRARY, 1), Team(LIBRARY, 2)
    whole = pack_linear(kind, weight, None, first, variant)(x)
    start = min(start, rows - 1)
    part = pack_linear(kind, weight, None, second, variant)(x[start : start + count])
    assert torch.equal(whole[start : start + count], part)
    first.close()
    second.close()


@needs_library
@per_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packing_is_that_of_the_twin(team, kind, dtype):
    for rows, k in [(1, 1), (16, 64), (40, 77), (19, 300)]:
        source = tensors(rows, k + 3, seed=rows, dtype=dtype)[:, :k]
        source[0] = 0
        source[-1, 0] = source[-1].abs().max() * -1  # two of one magnitude
        mine = PackedLinear(kind, rows, k, team)
        mine.place(Part(source, 0))
        packed, scales = pack_integers(kind, source)
        assert torch.equal(mine.packed, packed)
        assert torch.equal(mine.scales, scales)


@needs_library
@per_kind
def test_parts_and_gates_go_to_their_blocks(team, kind):
    q, k, v = tensors(32, 70, seed=1), tensors(16, 70, seed=2), tensors(9, 70, seed=3)
    fused = PackedLinear(kind, 57, 70, team)
    for source, block in ((q, 0), (k, 2), (v, 3)):
        fused.place(Part(source, block))
    x = tensors(5, 70)
    parts = [pack_linear(kind, source, None, None)(x) for source in (q, k, v)]
    assert torch.equal(fused(x), torch.cat(parts, dim=1))
    smaller = pack_linear(Kind.BF16, torch.cat([q, k, v]), None, None)
    assert fused.num_bytes < smaller.num_bytes


@per_kind
def test_numbers_are_rounded_to_the_nearest(kind):
    source = tensors(40, 300)
    packed, scales = pack_integers(kind, source)
    numbers, by_row = unpack_integers(kind, packed, scales, 300)
    group = GROUPS[kind] if kind == Kind.INT4 else 300
    spread = by_row.repeat_interleave(group, dim=1)[:40, :300]
    errors = (numbers[:40] * spread - source).abs() / spread.abs()
    # What would be +8 of INT4 is cut to 7.
    assert (errors <= 0.501).float().mean() > (0.98 if kind == Kind.INT4 else 0.9999)
    assert errors.max() <= (1.02 if kind == Kind.INT4 else 0.501)
    assert numbers.max() <= (7 if kind == Kind.INT4 else 127)
    assert not by_row[40:].any()


@per_kind
def test_products_are_near_the_exact_ones(kind):
    for k in (64, 1024, 3000):
        weight, x = tensors(64, k, seed=1), tensors(20, k, seed=2)
        packed, scales = pack_integers(kind, weight)
        got, exact = multiply_integers(kind, x, packed, scales), F.linear(x, weight)
        assert (got - exact).norm() / exact.norm() < WEIGHT_ERROR[kind]


@per_kind
def test_inputs_are_rounded_by_groups(kind):
    x = tensors(3, 400)
    x[1, 128:256] *= 1e4
    x[2] = 0
    numbers, scales = round_inputs(kind, x)
    group = GROUPS[kind]
    back = numbers * scales.repeat_interleave(group, dim=1)[:, :400]
    bound = scales.repeat_interleave(group, dim=1)[:, :400] * 0.501
    assert ((back - x).abs() <= bound).all()
    assert not back[2].any()
    assert (x[1, :128] - back[1, :128]).abs().max() < (1e-4 if kind != Kind.W8A8 else 0.02)


@needs_library
@per_variant
@per_kind
def test_what_is_not_finite_shows(kind, variant):
    team = Team(LIBRARY, 1)
    weight = tensors(20, 300)
    linear = pack_linear(kind, weight, None, team, variant)
    x = tensors(4, 300)
    x[1, 7], x[2, 290], x[3] = torch.nan, torch.inf, 1e-36
    y = linear(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert not y[3].any()
    weight[3, 5], weight[4, 100], weight[5] = torch.nan, -torch.inf, 1e-36
    linear = pack_linear(kind, weight, None, team, variant)
    y = linear(tensors(2, 300))
    assert y[:, 3:5].isnan().all()
    assert not y[:, 5].any()
    assert y[:, 6:].isfinite().all()
    torch.testing.assert_close(y, linear.twin(tensors(2, 300)), rtol=0, atol=0, equal_nan=True)
    team.close()


@per_kind
def test_without_a_library_torch_computes(kind):
    weight, bias, x = tensors(21, 130).bfloat16(), tensors(21), tensors(4, 130)
    linear = pack_linear(kind, weight, bias, None)
    expected = multiply_integers(kind, x, linear.packed, linear.scales)[:, :21] + bias
    assert torch.equal(linear(x), expected)
    out = torch.ones(4, 21)
    linear(x, Epilogue.ADD, out)
    assert torch.equal(out, expected + 1)
    gated = pack_gate_up(kind, weight, weight, None)
    y = pack_linear(kind, weight, None, None)(x)
    torch.testing.assert_close(gated(x, Epilogue.SILU_MUL), F.silu(y) * y)
