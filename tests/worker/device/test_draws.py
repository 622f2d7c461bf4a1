"""Draws with padding behind them: nobody's rows are drawn from by nobody, whatever they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.worker.device.reference_ops import ReferenceDraws
from tests.worker.triton_interpreter import DEVICE
from xllm.protocol.sampling import SamplingParams
from xllm.worker.execution.device.draws import DeviceDrawing, DrawnTokens, StepDraws
from xllm.worker.execution.device.tensors import padded_draws
from xllm.worker.execution.device.under_way import MAX_UNDER_WAY
from xllm.worker.graphs.choice import DrawKind
from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.sampling.rows import SampleRow

VOCAB = 40
MOST = 5


class Identity:
    """A model whose last output is its logits."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


@pytest.fixture(params=[ReferenceDraws, DeviceSampler])
def sampler(request):
    return request.param(VOCAB, DEVICE, MOST)


def numbers_of(sampler, count: int, first: int, kind: DrawKind) -> StepDraws:
    params = SamplingParams(
        temperature=1.0, seed=3, top_p=0.9 if kind is DrawKind.FILTERED else 1.0
    )
    inputs = sampler.prepare([SampleRow(params, 0, 7 + at, (), ()) for at in range(count)])
    assert inputs.filtered == (kind is DrawKind.FILTERED)
    return StepDraws(inputs.numbers.numpy(), np.arange(first, first + count), kind)


@pytest.mark.parametrize("kind", [DrawKind.PLAIN, DrawKind.FILTERED])
def test_padding_writes_nobodys_place_alone(sampler, kind: DrawKind) -> None:
    drawn = DrawnTokens(MOST, DEVICE)
    drawing = DeviceDrawing(Identity(), sampler, drawn)  # type: ignore[arg-type]
    logits = torch.randn((MOST, VOCAB), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[3:] = float("nan")  # rows of nobody
    found = []
    for size in (3, MOST):
        first, tokens = drawn.next(3)
        drawn.flat.fill_(-77)
        draws = padded_draws(numbers_of(sampler, 3, first, kind), size)
        # Left by a step before this one.
        drawing._tokens.fill_(-9)
        drawing._flags.fill_(1)
        read = np.array([2, 0, 1, *[3] * (size - 3)])
        drawing.draw(
            logits,
            torch.from_numpy(read).to(DEVICE),
            torch.from_numpy(draws.numbers).to(DEVICE),
            torch.from_numpy(draws.places).to(DEVICE),
            kind,
        )
        assert (tokens >= 0).all()
        found.append(tokens.tolist())
        others = drawn.flat.tolist()[1:]
        del others[first - 1 : first + 2]
        assert set(others) == {-77}
    assert found[0] == found[1]


def test_a_row_that_is_not_finite_draws_minus_one_alone(sampler) -> None:
    drawn = DrawnTokens(MOST, DEVICE)
    drawing = DeviceDrawing(Identity(), sampler, drawn)  # type: ignore[arg-type]
    logits = torch.zeros((3, VOCAB), device=DEVICE)
    logits[1, 5] = float("nan")
    first, tokens = drawn.next(3)
    draws = numbers_of(sampler, 3, first, DrawKind.PLAIN)
    drawing.draw(
        logits,
        torch.arange(3, device=DEVICE),
        torch.from_numpy(draws.numbers).to(DEVICE),
        torch.from_numpy(draws.places).to(DEVICE),
        DrawKind.PLAIN,
    )
    assert [token < 0 for token in tokens.tolist()] == [False, True, False]


def test_steps_that_may_be_under_way_together_have_places_of_their_own() -> None:
    drawn = DrawnTokens(MOST, DEVICE)
    firsts = [drawn.next(MOST)[0] for _ in range(MAX_UNDER_WAY + 1)]
    places = [place for first in firsts for place in range(first, first + MOST)]
    assert len(set(places)) == len(places)
    assert 0 not in places  # nobody's
    assert not [first for first in firsts if first * 8 % 16]
    assert drawn.next(MOST)[0] == firsts[0]
