"""Recording graphs on a device that computes behind the host's back."""

from __future__ import annotations

import random

import pytest
import torch

from tests.worker.platform.device_api import cuda_api, npu_api, npu_versions
from tests.worker.platform.fake_streams import FakeGraph, FakeStreams
from xllm.errors import EngineError
from xllm.worker.platform.stream_copies import StreamCopier
from xllm.worker.platform.stream_graphs import StreamGraphs

CPU = torch.device("cpu")
DEVICES = {
    "cuda": (cuda_api(), "CUDAGraph"),
    **{f"npu-{v}": (npu_api(v), "NPUGraph") for v in npu_versions()},
}


class Recorder:
    """A device, its graphs, and what it made of the driver's graphs."""

    def __init__(self, name: str, seed: int = 0) -> None:
        api, graph_class = DEVICES[name]
        self.device = FakeStreams(api, random.Random(seed), graph_class)
        self.made: list[FakeGraph] = []
        self.graphs = StreamGraphs(self.device, CPU, self.make)

    def make(self) -> FakeGraph:
        graph = FakeGraph(self.device, self.device.graph_class, (), {})
        self.made.append(graph)
        return graph


@pytest.fixture(params=DEVICES)
def recorder(request) -> Recorder:
    return Recorder(request.param)


@pytest.mark.parametrize("seed", range(10))
def test_a_graph_does_the_work_again(recorder, seed) -> None:
    device = recorder.device
    device.rng.seed(seed)
    state = device.tensor([1])
    with device.running():
        state.add_(1)
        # Once for real, behind what was started before; once to record, which changes nothing.
        graph = recorder.graphs.capture(lambda: state.mul_(3))
        state.add_(1)
        graph.replay()
        graph.replay()
        device.run_all()
    assert state.tolist() == [((1 + 1) * 3 + 1) * 3 * 3]


def test_graphs_share_a_pool_and_one_side_stream(recorder) -> None:
    device, streams = recorder.device, []
    state = device.tensor([1])

    def run() -> None:
        streams.append(device.current)
        state.add_(1)

    with device.running():
        for _ in range(3):
            recorder.graphs.capture(run)
    assert {graph.pool for graph in recorder.made} == {(0, 1)}
    assert len(set(streams)) == 1
    assert streams[0] is not device.default
    assert device.current is device.default


def test_what_cannot_be_recorded_leaves_the_device_usable(recorder) -> None:
    device = recorder.device
    state = device.tensor([1])

    def waits() -> None:
        state.add_(1)
        if device.current.capture is not None:
            device.synchronize(CPU)

    with device.running():
        with pytest.raises(EngineError, match=r"could not be recorded: [^\n]*$") as caught:
            recorder.graphs.capture(waits)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert device.current is device.default
        graph = recorder.graphs.capture(lambda: state.mul_(2))
        graph.replay()
        device.run_all()
    # The failed one ran once, in its warm-up.
    assert state.tolist() == [(1 + 1) * 2 * 2]
    broken, whole = recorder.made
    assert (broken.state, whole.state) == ("spoilt", "captured")
    # The allocator may ask the broken one: it lives as long as the device's graphs do.
    assert broken in recorder.graphs._failed


def test_an_error_of_the_caller_stays_what_it_is(recorder) -> None:
    device = recorder.device

    def fails() -> None:
        if device.current.capture is not None:
            raise KeyError("layer")

    with device.running():
        with pytest.raises(KeyError, match="layer"):
            recorder.graphs.capture(fails)
        assert device.current is device.default
        recorder.graphs.capture(lambda: None).replay()


def test_an_error_before_the_capture(recorder) -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("no memory\nand more lines")

    with recorder.device.running(), pytest.raises(EngineError, match=r"recorded: no memory$"):
        recorder.graphs.capture(no_memory)
    assert recorder.made == []
    assert recorder.device.current is recorder.device.default


@pytest.mark.parametrize("seed", range(10))
def test_the_warm_up_is_in_order_though_nothing_is_recorded(recorder, seed) -> None:
    device = recorder.device
    device.rng.seed(seed)
    state = device.tensor([1])

    def no_graph() -> FakeGraph:
        raise RuntimeError("no graphs here")

    graphs = StreamGraphs(device, CPU, no_graph)
    with device.running():
        with pytest.raises(EngineError, match="no graphs here"):
            graphs.capture(lambda: state.mul_(3))
        state.add_(1)
        device.run_all()
    assert state.tolist() == [4]


def test_closing_lets_graphs_go_behind_their_work(recorder) -> None:
    device = recorder.device
    state = device.tensor([1])
    with device.running():
        first, second, third = (recorder.graphs.capture(lambda: state.add_(1)) for _ in range(3))
        second.replay()
        second.close()
        assert [graph.state for graph in recorder.made] == ["captured", "reset", "captured"]
        assert state.tolist() == [1 + 3 + 1]
        second.close()
        with pytest.raises(EngineError, match="was closed"):
            second.replay()
        device.calls.clear()
        recorder.graphs.close()
    assert device.calls.index("synchronize") < device.calls.index(f"{device.graph_class}.reset")
    assert {graph.state for graph in recorder.made} == {"reset"}
    recorder.graphs.close()
    first.close()
    third.close()


def test_a_device_that_fails_is_an_engine_error(recorder) -> None:
    device = recorder.device
    with device.running():
        graph = recorder.graphs.capture(lambda: None)
        device.broken = "device-side assert"
        with pytest.raises(EngineError, match="could not be launched: device-side"):
            graph.replay()
        with pytest.raises(EngineError, match="could not be recorded: device-side"):
            recorder.graphs.capture(lambda: None)
        with pytest.raises(EngineError, match="the device failed: device-side"):
            recorder.graphs.close()


@pytest.mark.parametrize("seed", range(10))
def test_results_of_a_graph_are_read_while_it_runs_again(recorder, seed) -> None:
    """What an engine does: each step overwrites the tokens of the one before, whose copy may be
    late."""
    device = recorder.device
    device.rng.seed(seed)
    tokens = device.tensor([0, 0])
    copier = StreamCopier(device, CPU, device.pinned_bytes)
    with device.running():
        graph = recorder.graphs.capture(lambda: tokens.add_(1))
        copies = []
        for _ in range(5):
            graph.replay()
            copies.append(copier.copy(tokens))
            if len(copies) > 1:
                device.step()
        assert [copy.wait().tolist() for copy in copies] == [[2 + k, 2 + k] for k in range(5)]
