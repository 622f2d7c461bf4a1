"""Products of packed weights: every variant of this CPU against torch, on odd shapes too, and a
row's bits in every batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.linear import (
    Epilogue,
    PackedLinear,
    Part,
    pack_gate_up,
    pack_linear,
)
from xllm.worker.kernels.packing import Kind, pack, unpack
from xllm.worker.kernels.team import Team

LIBRARY = load().compiled
VARIANTS = [v for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
ROUNDS_INPUT = {"avx512-bf16", "amx"}  # with bfloat16 weights
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=load().reason)

per_variant = pytest.mark.parametrize("variant", VARIANTS, ids=[v.name for v in VARIANTS])
per_kind = pytest.mark.parametrize("kind", [Kind.BF16, Kind.FP32])


@pytest.fixture(scope="module", params=[1, 3])
def team(request):
    team = Team(LIBRARY, request.param)
    yield team
    team.close()


def tensors(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def as_seen(x, kind, variant):
    """x as the variant rounds it."""
    return x.bfloat16().float() if kind == Kind.BF16 and variant.name in ROUNDS_INPUT else x


def assert_near(got, expected, k):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6 * k**0.5)


@per_variant
@per_kind
def test_every_row_count_and_odd_shapes(team, kind, variant):
    for n, k in [(1, 1), (16, 2), (33, 37), (80, 64), (48, 1055), (7, 2081)]:
        weight = tensors(n, k, seed=n, dtype=torch.bfloat16)
        bias = tensors(n, seed=k)
        linear = pack_linear(kind, weight, bias, team, variant.number)
        for rows in [*range(18), 23, 28, 29, 32, 47, 70, 131]:
            x = tensors(rows, k, seed=rows)
            expected = F.linear(as_seen(x, kind, variant), weight.float(), bias)
            assert_near(linear(x), expected, k)


@per_variant
@per_kind
def test_epilogues_and_strides(team, kind, variant):
    for half, k in [(5, 33), (16, 64), (40, 130)]:
        gate, up = tensors(half, k, seed=1), tensors(half, k, seed=2)
        gated = pack_gate_up(kind, gate, up, team, variant.number)
        gated.place_bias(tensors(half, seed=3), 0, 2)
        gated.place_bias(tensors(half, seed=4), 1, 2)
        plain = pack_linear(kind, up, None, team, variant.number)
        stored = torch.bfloat16 if kind == Kind.BF16 else torch.float32
        gate, up = gate.to(stored).float(), up.to(stored).float()
        for rows in (1, 2, 9, 35):
            wide = tensors(rows, k + 9, seed=rows)
            x = wide[:, 3 : 3 + k]
            seen = as_seen(x, kind, variant)
            g, u = F.linear(seen, gate), F.linear(seen, up)
            expected = F.silu(g + tensors(half, seed=3)) * (u + tensors(half, seed=4))
            torch.testing.assert_close(
                gated(x, Epilogue.SILU_MUL), expected, rtol=3e-5, atol=3e-5 * k**0.5
            )
            out = tensors(rows, half + 5, seed=6)
            before = out.clone()
            plain(x, Epilogue.ADD, out[:, 2 : 2 + half])
            assert_near(out[:, 2 : 2 + half], before[:, 2 : 2 + half] + u, k)
            assert torch.equal(out[:, :2], before[:, :2])
            assert torch.equal(out[:, 2 + half :], before[:, 2 + half :])


@per_variant
@per_kind
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 2200),
    rows=st.integers(2, 140),
    start=st.integers(0, 139),
    count=st.integers(1, 140),
)
def test_a_row_has_the_same_bits_in_every_batch(kind, variant, n, k, rows, start, count):
    weight = tensors(n, k, seed=n)
    x = tensors(rows, k, seed=k)
    first, second = Team(LIBRARY, 1), Team(LIBRARY, 2)
    whole = pack_linear(kind, weight, None, first, variant.number)(x)
    start = min(start, rows - 1)
    part = pack_linear(kind, weight, None, second, variant.number)(x[start : start + count])
    assert torch.equal(whole[start : start + count], part)
    first.close()
    second.close()


def test_silu_is_accurate_and_bounded(team):
    k = 1
    x = torch.cat([torch.linspace(-85, 85, 4001), torch.tensor([-1e4, 1e4, 0.0])])
    gated = pack_gate_up(Kind.FP32, torch.ones(1, k), torch.zeros(1, k), team)
    gated.place_bias(torch.ones(1), 1, 2)
    got = gated(x[:, None], Epilogue.SILU_MUL)[:, 0]
    expected = F.silu(x.double())
    assert ((got - expected).abs() <= 1e-6 * expected.abs() + 1e-30).all()
    assert gated(torch.tensor([[torch.nan]]), Epilogue.SILU_MUL).isnan().all()


@per_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packing_is_that_of_the_twin(team, kind, dtype):
    for rows, k in [(1, 1), (16, 32), (40, 77), (19, 130)]:
        source = tensors(rows, k + 3, seed=rows, dtype=dtype)[:, :k]
        mine = PackedLinear(kind, rows, k, team)
        mine.place(Part(source, 0))
        assert torch.equal(mine.packed, pack(kind, source))
        assert torch.equal(
            unpack(kind, mine.packed, k)[:rows], unpack(kind, pack(kind, source), k)[:rows]
        )


@per_kind
def test_special_values_survive_packing(team, kind):
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        info = torch.finfo(dtype)
        values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max]
        values += [info.smallest_normal, info.smallest_normal / 4, 1 + 2**-8, 1 + 3 * 2**-8]
        source = torch.tensor([values], dtype=dtype)
        mine = PackedLinear(kind, 1, len(values), team)
        mine.place(Part(source, 0))
        got = unpack(kind, mine.packed, len(values))[:1]
        expected = source.to(mine.packed.dtype).float()
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        number = ~expected.isnan()
        assert torch.equal(got.signbit()[number], expected.signbit()[number])


def test_parts_go_to_their_blocks(team):
    q, k, v = tensors(32, 20, seed=1), tensors(16, 20, seed=2), tensors(9, 20, seed=3)
    fused = PackedLinear(Kind.FP32, 57, 20, team)
    for source, block in ((q, 0), (k, 2), (v, 3)):
        fused.place(Part(source, block))
    x = tensors(5, 20)
    assert_near(fused(x), F.linear(x, torch.cat([q, k, v])), 20)
    with pytest.raises(ValueError, match="does not fit"):
        fused.place(Part(q, 3))
    with pytest.raises(ValueError, match="does not fit"):
        fused.place(Part(tensors(4, 21), 0))


def test_progress_and_probes_count(team):
    before = team.progress
    pack_linear(Kind.FP32, torch.ones(64, 64), None, team)(torch.ones(3, 64))
    assert team.progress > before
    assert team.product_peak(seconds=0.01) > 1e8
    assert team.read_bandwidth(torch.zeros(1 << 22, dtype=torch.uint8)) > 1e7


def test_a_team_wants_a_thread():
    with pytest.raises(ValueError, match="num_threads"):
        Team(LIBRARY, 0)
