"""Copies, uploads and graphs on a real GPU, whose place a fake takes in the other tests."""

from __future__ import annotations

import pytest
import torch

from xllm.errors import EngineError
from xllm.worker.platform.cuda import CudaPlatform
from xllm.worker.platform.listing import list_devices

pytestmark = pytest.mark.gpu
_ROWS = 1 << 22
"""Enough numbers that the device is behind the host for a while."""


@pytest.fixture
def gpu() -> CudaPlatform:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    platform = CudaPlatform()
    platform.prepare(1, 0)
    return platform


def keep_busy(gpu: CudaPlatform) -> None:
    """Work that the current stream does before anything behind it."""
    square = torch.ones((4096, 4096), device=gpu.device)
    for _ in range(8):
        square = square @ square * 1e-4


def test_copies_hold_what_was_there(gpu) -> None:
    copier = gpu.copier()
    tokens = torch.zeros(64, dtype=torch.int64, device=gpu.device)
    copies = []
    for _ in range(20):
        keep_busy(gpu)
        tokens.add_(1)
        copies.append(copier.copy(tokens))
    for step, copy in enumerate(copies, 1):
        found = copy.wait()
        assert found.device.type == "cpu"
        assert found.tolist() == [step] * 64
        assert copy.is_done()
    copier.close()


def test_uploads_may_be_overwritten_at_once(gpu) -> None:
    host, ours = torch.arange(1000), torch.zeros(1000, dtype=torch.int64, device=gpu.device)
    keep_busy(gpu)
    gpu.upload(host, ours)
    new = gpu.upload(host)
    host.zero_()
    gpu.synchronize()
    assert ours.tolist() == new.tolist() == list(range(1000))


def test_graphs_are_recorded_and_replayed(gpu) -> None:
    graphs = gpu.graphs()
    numbers = torch.ones(_ROWS, device=gpu.device)
    doubled = torch.empty_like(numbers)

    def run() -> None:
        # Its own memory comes from the shared pool.
        torch.mul(numbers + 0.0, 2.0, out=doubled)

    graph, other = graphs.capture(run), graphs.capture(lambda: numbers.add_(1.0))
    numbers.fill_(5.0)
    graph.replay()
    assert doubled.unique().tolist() == [10.0]
    other.replay()
    graph.replay()
    assert doubled.unique().tolist() == [12.0]
    graphs.close()
    with pytest.raises(EngineError, match="was closed"):
        graph.replay()


def test_what_cannot_be_recorded_leaves_the_gpu_usable(gpu) -> None:
    graphs = gpu.graphs()
    numbers = torch.ones(8, device=gpu.device)
    before = torch.cuda.current_stream(gpu.device)
    with pytest.raises(EngineError, match="could not be recorded"):
        graphs.capture(lambda: numbers.add_(numbers.sum().item()))
    assert torch.cuda.current_stream(gpu.device) == before
    numbers.fill_(1.0)
    graph = graphs.capture(lambda: numbers.mul_(2.0))
    graph.replay()
    assert numbers.tolist() == [4.0] * 8
    graphs.close()


def test_a_mark_and_the_list_of_devices(gpu) -> None:
    keep_busy(gpu)
    mark = gpu.mark()
    gpu.synchronize()
    assert mark()
    found = [device for device in list_devices() if device.kind == "cuda"]
    assert len(found) == torch.cuda.device_count()
    assert all(device.is_there for device in found)
