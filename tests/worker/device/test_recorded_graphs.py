"""The recorder finds what a capture on a device would not bear."""

from __future__ import annotations

import pytest
import torch

from tests.worker.device.recorded_graphs import RecordedGraphs, kernel
from xllm.errors import EngineError


def test_a_replay_does_it_again_over_the_same_tensors() -> None:
    source, out = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64)

    @kernel
    def write(found: torch.Tensor) -> None:
        out.copy_(torch.tensor(found.tolist()))  # a kernel may look

    graph = RecordedGraphs().capture(lambda: write((source * 2).view(1, 2)[0] + 1))
    assert out.tolist() == [3, 5]
    source.copy_(torch.tensor([5, 6]))
    graph.replay()
    assert out.tolist() == [11, 13]


def test_numbers_of_the_host_are_those_of_the_capture() -> None:
    out, step = torch.zeros(1), [1.0]
    graph = RecordedGraphs().capture(lambda: out.fill_(step[0]))
    step[0] = 2.0
    graph.replay()
    assert out.tolist() == [1.0]


def test_a_look_at_a_number_cannot_be_captured() -> None:
    source = torch.tensor([1])
    with pytest.raises(EngineError, match="a number was read"):
        RecordedGraphs().capture(lambda: source.item())


def test_a_tensor_that_is_made_anew_is_that_of_the_capture() -> None:
    kept, out = torch.ones(1), torch.zeros(1)
    loose = [torch.ones(1)]
    graph = RecordedGraphs().capture(lambda: out.copy_(loose[0] + kept))
    loose[0] = torch.full((1,), 5.0)
    graph.replay()
    assert out.tolist() == [2.0]
