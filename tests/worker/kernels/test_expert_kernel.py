"""Experts by the kernels: every variant of this CPU against torch, on odd shapes, with experts that
no row chooses and experts in one slot; and a row's bits in every batch, wherever experts lie."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import EngineError
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.experts import ExpertSizes, PackedExperts
from xllm.worker.kernels.linear import Part
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team

LIBRARY = load().compiled
VARIANTS = [v for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
INTEGERS = [Kind.INT8, Kind.INT4, Kind.W8A8]
ROUNDS_INPUT = {"avx512-bf16", "amx"}  # with bfloat16 weights
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=load().reason)

per_variant = pytest.mark.parametrize("variant", VARIANTS, ids=[v.name for v in VARIANTS])


@pytest.fixture(scope="module", params=[1, 3])
def team(request):
    team = Team(LIBRARY, request.param)
    yield team
    team.close()


@dataclasses.dataclass
class Weights:
    """Of all slots, as a checkpoint would have them."""

    router: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def random_weights(sizes: ExpertSizes, kind: Kind) -> Weights:
    generator = torch.Generator().manual_seed(sizes.hidden + sizes.inner)

    def normal(*shape):
        numbers = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        return numbers if kind == Kind.FP32 else numbers.bfloat16()

    return Weights(
        normal(sizes.num_experts, sizes.hidden) * 3,
        normal(sizes.num_slots, sizes.inner, sizes.hidden),
        normal(sizes.num_slots, sizes.inner, sizes.hidden),
        normal(sizes.num_slots, sizes.hidden, sizes.inner),
    )


def make(sizes, kind, weights, team, variant=0, slots=None, router_kind=None):
    slots = torch.arange(sizes.num_experts) if slots is None else slots
    counts = torch.zeros(sizes.num_experts, dtype=torch.int32)
    router_kind = Kind.FP32 if router_kind is None else router_kind
    experts = PackedExperts(kind, router_kind, sizes, slots, counts, team, variant)
    experts.router.place(Part(weights.router, 0))
    for slot in range(sizes.num_slots):
        first = 2 * slot * experts.inner_blocks
        experts.gate_up.place(Part(weights.gate[slot], first, 2))
        experts.gate_up.place(Part(weights.up[slot], first + 1, 2))
        experts.down.place(Part(weights.down[slot], slot * experts.hidden_blocks))
    return experts


def defined(sizes: ExpertSizes, weights: Weights, slots: torch.Tensor, x: torch.Tensor):
    """The definition in fp64, one row and one expert at a time; and the counts."""
    router, gate, up, down = (w.double() for w in dataclasses.astuple(weights))
    out = torch.zeros(x.shape, dtype=torch.float64)
    counts = torch.zeros(sizes.num_experts, dtype=torch.int32)
    for row, to in zip(x.double(), out, strict=True):
        shares, chosen = (router @ row).softmax(0).topk(sizes.top_k)
        if sizes.normalise:
            shares = shares / shares.sum()
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            slot = int(slots[expert])
            counts[expert] += 1
            to += share * (down[slot] @ (F.silu(gate[slot] @ row) * (up[slot] @ row)))
    return out, counts


SHAPES = [
    ExpertSizes(8, 8, 2, True, 64, 48),
    ExpertSizes(5, 7, 5, False, 33, 21),
    ExpertSizes(9, 9, 8, True, 130, 17),
    ExpertSizes(3, 3, 1, False, 16, 16),
    ExpertSizes(1, 2, 1, True, 1, 1),
]


@per_variant
@pytest.mark.parametrize("kind", [Kind.BF16, Kind.FP32])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_rows_pass_their_experts(team, variant, kind, sizes):
    """Also where experts share a slot, and with more rows than one product or slice takes."""
    weights = random_weights(sizes, kind)
    slots = torch.randperm(sizes.num_slots)[: sizes.num_experts].contiguous()
    experts = make(sizes, kind, weights, team, variant.number, slots)
    rounds = kind == Kind.BF16 and variant.name in ROUNDS_INPUT
    bound = 2e-2 if rounds else 2e-5
    for rows in (0, 1, 2, 5, 17, 70, *([600] if sizes == SHAPES[0] else [])):
        x = torch.randn(rows, sizes.hidden)
        if rows == 17:
            slots[-1] = slots[0]  # a replica: both are in one slot
        if rounds:
            x = x.bfloat16().float()
        want, counts = defined(sizes, weights, slots, x)
        experts.counts.zero_()
        found = experts(x)
        assert torch.equal(experts.counts, counts)
        assert ((found - want).abs() <= bound * (1 + want.abs())).all()
        experts.counts.zero_()
        assert ((experts.twin(x) - want).abs() <= 2e-5 * (1 + want.abs())).all()
        assert torch.equal(experts.counts, counts)


@pytest.mark.parametrize("kind", INTEGERS)
def test_quantized_experts(team, kind):
    """Against the twin, which rounds as they do."""
    for sizes in SHAPES:
        weights = random_weights(sizes, kind)
        experts = make(sizes, kind, weights, team)
        for rows in (1, 3, 40):
            x = torch.randn(rows, sizes.hidden)
            torch.testing.assert_close(experts(x), experts.twin(x), rtol=2e-3, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_every_batch(data):
    """Beside other rows, with other threads, its experts in other slots, one of them twice."""
    variant = data.draw(st.sampled_from(VARIANTS))
    kind = data.draw(st.sampled_from([Kind.BF16, Kind.FP32, *INTEGERS]))
    num_experts = data.draw(st.integers(1, 12))
    hidden, inner = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 80))
    top_k = data.draw(st.integers(1, min(8, num_experts)))
    normalise = data.draw(st.booleans())
    sizes = ExpertSizes(num_experts, num_experts, top_k, normalise, hidden, inner)
    weights = random_weights(sizes, kind)
    x = torch.randn(data.draw(st.integers(2, 90)), hidden)
    one, three = Team(LIBRARY, 1), Team(LIBRARY, 3)
    router_kind = Kind.BF16 if kind == Kind.BF16 else Kind.FP32
    whole = make(sizes, kind, weights, one, variant.number, None, router_kind)(x)

    wider = dataclasses.replace(sizes, num_slots=num_experts + 1)
    order = torch.tensor(data.draw(st.permutations(range(num_experts + 1))))
    placed = dataclasses.replace(weights)
    for name in ("gate", "up", "down"):
        source = getattr(weights, name)
        moved = torch.zeros(num_experts + 1, *source.shape[1:], dtype=source.dtype)
        moved[order[:num_experts]] = source
        moved[order[-1]] = source[0]
        setattr(placed, name, moved)
    slots = order[:num_experts].clone()
    if data.draw(st.booleans()):
        slots[0] = order[-1]
    other = make(wider, kind, placed, three, variant.number, slots, router_kind)
    rows = torch.tensor(data.draw(st.permutations(range(len(x)))))
    rows = rows[: data.draw(st.integers(1, len(x)))]
    assert torch.equal(other(x[rows]).view(torch.int32), whole[rows].view(torch.int32))
    one.close()
    three.close()


def test_a_row_that_is_no_number_spoils_no_other(team):
    sizes = ExpertSizes(8, 8, 2, True, 64, 48)
    experts = make(sizes, Kind.FP32, random_weights(sizes, Kind.FP32), team)
    x = torch.randn(6, 64)
    want = experts(x)
    x[2, 5], x[4] = float("nan"), float("inf")
    found = experts(x)
    assert found[2].isnan().all()
    assert found[4].isnan().all()
    for row in (0, 1, 3, 5):
        assert torch.equal(found[row], want[row])


def test_equal_experts_are_chosen_in_their_order(team):
    sizes = ExpertSizes(6, 6, 3, True, 16, 16)
    weights = random_weights(sizes, Kind.FP32)
    weights.router.zero_()
    experts = make(sizes, Kind.FP32, weights, team)
    experts(torch.randn(4, 16))
    assert experts.counts.tolist() == [4, 4, 4, 0, 0, 0]


def test_a_slot_that_there_is_not_is_an_error(team):
    sizes = ExpertSizes(4, 5, 2, True, 16, 16)
    experts = make(sizes, Kind.FP32, random_weights(sizes, Kind.FP32), team)
    for slot in (-1, 5):
        experts.slots[2] = slot
        with pytest.raises(EngineError, match=r"slots outside of 0 to 4: \[0, 1, "):
            experts(torch.randn(1, 16))
    experts.slots[2] = 4
    experts(torch.randn(1, 16))


def test_without_a_team_torch_computes():
    sizes = ExpertSizes(4, 4, 2, False, 20, 12)
    weights = random_weights(sizes, Kind.FP32)
    x = torch.randn(7, 20)
    want, _ = defined(sizes, weights, torch.arange(4), x)
    found = make(sizes, Kind.FP32, weights, None)(x)
    torch.testing.assert_close(found, want.float())
