"""A decoder layer, the head and the arg-max by the kernels, against torch."""

from __future__ import annotations

import itertools
from array import array

import pytest
import torch
import torch.nn.functional as F

from xllm.errors import EngineError
from xllm.worker.attention.plan import Span
from xllm.worker.kernels.attention import StepArrays
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.experts import ExpertSizes, PackedExperts
from xllm.worker.kernels.fused import FusedHead, FusedLayer, FusedLayers, LayerParts, arg_max
from xllm.worker.kernels.linear import Part, pack_gate_up, pack_linear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.structures import PHASES
from xllm.worker.kernels.team import Team
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory

LIBRARY = load().compiled
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built")
VARIANTS = [v.number for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
HIDDEN, INNER, HEADS, KV_HEADS, DIM, EPS = 72, 88, 6, 2, 16, 1e-6


@pytest.fixture(scope="module")
def team() -> Team:
    assert LIBRARY is not None
    return Team(LIBRARY, 2)


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Case:
    """Random weights of a layer and its twin in torch, for one sequence from its first token."""

    def __init__(self, team: Team, variant: int, *, norms: bool, sparse: bool) -> None:
        torch.manual_seed(1)
        self.team = team
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.qkv, self.bias = torch.randn(width, HIDDEN) / HIDDEN**0.5, torch.randn(width)
        self.out = torch.randn(HIDDEN, HEADS * DIM) / (HEADS * DIM) ** 0.5
        self.gate, self.up = torch.randn(2, INNER, HIDDEN).unbind()
        self.down = torch.randn(HIDDEN, INNER) / INNER**0.5
        self.norms = [1 + 0.1 * torch.randn(size) for size in (HIDDEN, HIDDEN, DIM, DIM)]
        if not norms:
            self.norms[2:] = [None, None]
        kind = Kind.FP32
        self.parts = LayerParts(
            pack_linear(kind, self.qkv, self.bias, team, variant),
            pack_linear(kind, self.out, None, team, variant),
            None if sparse else pack_gate_up(kind, self.gate, self.up, team, variant),
            None if sparse else pack_linear(kind, self.down, None, team, variant),
            *self.norms,
            EPS,
            HEADS,
            KV_HEADS,
            DIM,
            self.experts(variant) if sparse else None,
        )
        self.memory = CpuKvMemory(BlockLayout(80, 16, 2, KV_HEADS, DIM, 4), torch.float32)
        layer_bytes = self.memory.layout.layer_bytes
        self.layer = FusedLayer(team, self.parts, 1, 0, layer_bytes, variant)

    def experts(self, variant: int) -> PackedExperts:
        """In each slot the MLP, so that their weighted sum is its result."""
        sizes = ExpertSizes(3, 2, 2, True, HIDDEN, INNER)
        slots, counts = torch.tensor([1, 0, 1]), torch.zeros(3, dtype=torch.int32)
        experts = PackedExperts(Kind.FP32, Kind.FP32, sizes, slots, counts, self.team, variant)
        experts.router.place(Part(torch.zeros(3, HIDDEN), 0))
        for slot in (0, 1):
            first = 2 * slot * experts.inner_blocks
            experts.gate_up.place(Part(self.gate, first, 2))
            experts.gate_up.place(Part(self.up, first + 1, 2))
            experts.down.place(Part(self.down, slot * experts.hidden_blocks))
        return experts

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T

    def expected(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv = (normed(x, self.norms[0]) @ self.qkv.T + self.bias).view(len(x), -1, DIM)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = (
            rotated(normed(y, w), cos, sin) for y, w in ((q, self.norms[2]), (k, self.norms[3]))
        )
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + found[0].transpose(0, 1).flatten(1) @ self.out.T
        return x + self.feed_forward(normed(x, self.norms[1]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("norms", "sparse"), [(True, False), (False, False), (True, True)])
def test_a_layer(team: Team, variant: int, norms: bool, sparse: bool) -> None:
    """600 rows: more than one slice of the products; then the same in chunks, bit by bit."""
    case = Case(team, variant, norms=norms, sparse=sparse)
    rows = 600
    x, angles = torch.randn(rows, HIDDEN), torch.randn(rows, DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    table = array("q", reversed(range(80)))
    phases = torch.zeros(len(PHASES), dtype=torch.int64)

    def run(start: int, end: int) -> torch.Tensor:
        arrays = StepArrays([Span(start, end - start, table)], case.memory, phases)
        arrays.set_angles(cos[start:end], sin[start:end])
        hidden = x[start:end].clone()
        case.layer(hidden, arrays)
        return hidden

    whole = run(0, rows)
    assert (whole - case.expected(x, cos, sin)).abs().max() < 2e-3
    assert (phases[:5] > 0).all()
    before = team.progress
    borders = [0, 1, 17, 300, 599, 600]
    parts = [run(a, b) for a, b in itertools.pairwise(borders)]
    assert torch.equal(torch.cat(parts), whole)
    assert team.progress > before


def layers_of(case: Case, variant: int) -> list[FusedLayer]:
    """The case's weights as both layers of its memory."""
    layer_bytes = case.memory.layout.layer_bytes
    return [FusedLayer(case.team, case.parts, k, 0, layer_bytes, variant) for k in (0, 1)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [1, 530])
def test_layers_together_are_the_layers_one_by_one(
    team: Team, variant: int, sparse: bool, rows: int
) -> None:
    case = Case(team, variant, norms=True, sparse=sparse)
    angles = torch.randn(rows, DIM // 2)
    x, layers = torch.randn(rows, HIDDEN), layers_of(case, variant)
    arrays = StepArrays([Span(0, rows, array("q", range(40)))], case.memory)
    arrays.set_angles(angles.cos(), angles.sin())
    alone, together = x.clone(), x.clone()
    for layer in layers:
        layer(alone, arrays)
    before = team.progress
    FusedLayers(team, layers, variant)(together, arrays)
    assert torch.equal(together, alone)
    assert team.progress - before >= 2 * 4  # it moves with every product of each layer
    FusedLayers(team, [], variant)(together, arrays)
    assert torch.equal(together, alone)


def test_of_layers_together_the_one_with_a_wrong_table_is_named(team: Team) -> None:
    good, bad = (Case(team, 0, norms=True, sparse=True) for _ in range(2))
    layers = [layers_of(good, 0)[0], layers_of(bad, 0)[1]]
    assert bad.parts.experts is not None
    bad.parts.experts.slots[0] = 2
    arrays = StepArrays([Span(0, 1, array("q", [0]))], good.memory)
    angles = torch.randn(1, DIM // 2)
    arrays.set_angles(angles.cos(), angles.sin())
    x = torch.randn(1, HIDDEN)
    hidden = x.clone()
    with pytest.raises(EngineError, match="outside of 0 to 1: \\[2, 0, 1\\]"):
        FusedLayers(team, layers)(hidden, arrays)
    assert torch.equal(hidden, x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_halves_of_a_layer(team: Team, variant: int, sparse: bool) -> None:
    """A half on its own leaves hidden alone; both, added by the caller, are the whole layer."""
    case = Case(team, variant, norms=True, sparse=sparse)
    rows = 530
    x, angles = torch.randn(rows, HIDDEN), torch.randn(rows, DIM // 2)
    arrays = StepArrays([Span(0, rows, array("q", range(80)))], case.memory)
    arrays.set_angles(angles.cos(), angles.sin())
    whole = x.clone()
    case.layer(whole, arrays)
    hidden, out = x.clone(), torch.full_like(x, torch.nan)
    case.layer.attention_half(hidden, arrays, out)
    assert torch.equal(hidden, x)
    hidden += out
    before = hidden.clone()
    case.layer.mlp_half(hidden, arrays, out)
    assert torch.equal(hidden, before)
    hidden += out
    torch.testing.assert_close(hidden, whole, rtol=1e-5, atol=1e-5)


def test_a_layer_refuses_a_slot_that_there_is_not(team: Team) -> None:
    case = Case(team, 0, norms=True, sparse=True)
    assert case.parts.experts is not None
    case.parts.experts.slots[1] = 2
    arrays = StepArrays([Span(0, 1, array("q", [0]))], case.memory)
    arrays.set_angles(torch.ones(1, DIM // 2), torch.zeros(1, DIM // 2))
    with pytest.raises(EngineError, match="slots outside of 0 to 1"):
        case.layer(torch.randn(1, HIDDEN), arrays)


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_and_norm(team: Team, variant: int) -> None:
    torch.manual_seed(2)
    norm, weight, x = torch.rand(HIDDEN), torch.randn(333, HIDDEN), torch.randn(5, HIDDEN)
    head = FusedHead(team, norm, EPS, pack_linear(Kind.FP32, weight, None, team, variant), variant)
    logits = head(x)
    assert (logits - normed(x, norm) @ weight.T).abs().max() < 1e-4
    assert torch.equal(torch.cat([head(row[None]) for row in x]), logits)
    for size in (1, 7, 16, 33):
        part, scale = x[:, :size].contiguous(), norm[:size].contiguous()
        unit = pack_linear(Kind.FP32, torch.eye(size), None, team, variant)
        found = FusedHead(team, scale, EPS, unit, variant)(part)
        assert (found - normed(part, scale)).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 15, 16, 1000, 1024, 5003])
def test_arg_max(team: Team, variant: int, size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(6, size).round()  # many ties
    logits[1, size // 2] = float("nan")
    logits[2, -1] = float("inf")
    logits[3] = float("-inf")
    tops, places = arg_max(team, logits, variant)
    assert tops[1].isnan()
    for row in (0, 2, 3, 4, 5):
        assert tops[row] == logits[row].max()
        assert places[row] == int((logits[row] == logits[row].max()).nonzero()[0])
