"""Copies to the host beside a stream that computes on, in every order that a device may take."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.platform.device_api import cuda_api, npu_api, npu_versions
from tests.worker.platform.fake_streams import FakeStreams
from xllm.errors import EngineError
from xllm.worker.platform.copies import InstantCopier
from xllm.worker.platform.pinned import upload_pinned
from xllm.worker.platform.stream_copies import StreamCopier

APIS = {"cuda": cuda_api(), **{f"npu-{v}": npu_api(v) for v in npu_versions()}}
CPU = torch.device("cpu")


@pytest.fixture(params=APIS)
def device(request) -> FakeStreams:
    return FakeStreams(APIS[request.param], random.Random(0))


def copier_of(device: FakeStreams) -> StreamCopier:
    return StreamCopier(device, CPU, device.pinned_bytes)


MOVES = st.lists(
    st.sampled_from(["compute", "copy", "device", "ask", "wait", "forget"]), min_size=1, max_size=40
)


@settings(max_examples=80, deadline=None)
@given(api=st.sampled_from(sorted(APIS)), seed=st.integers(0, 2**32), moves=MOVES)
def test_a_copy_holds_what_was_there_when_it_began(api, seed, moves) -> None:
    """The tensor is changed behind every copy, results are read late, or by nobody."""
    rng = random.Random(seed)
    device = FakeStreams(APIS[api], rng)
    copier = copier_of(device)
    state = device.tensor([0, 10, 20])
    expected = [0, 10, 20]
    open_copies, read = [], []
    with device.running():
        for move in moves:
            match move:
                case "compute":
                    state.add_(1)
                    expected = [value + 1 for value in expected]
                case "copy":
                    open_copies.append((copier.copy(state[1:]), expected[1:]))
                case "device":
                    device.step()
                case "ask" if open_copies:
                    copy, wanted = rng.choice(open_copies)
                    if copy.is_done():
                        assert copy.wait().tolist() == wanted
                case "wait" if open_copies:
                    copy, wanted = open_copies.pop(rng.randrange(len(open_copies)))
                    read.append((copy.wait(), wanted))
                case "forget" if open_copies:
                    open_copies.pop(rng.randrange(len(open_copies)))
        copier.close()
        device.run_all()
    # Later copies wrote nothing over what was read before.
    assert all(found.tolist() == wanted for found, wanted in read)
    assert all(copy.wait().tolist() == wanted for copy, wanted in open_copies)
    assert state.tolist() == expected


def test_the_copying_stream_waits_for_the_computing_one(device) -> None:
    copier = copier_of(device)
    state = device.tensor([1, 2])
    device.calls.clear()
    with device.running():
        state.mul_(5)
        copy = copier.copy(state)
        assert not copy.is_done()
        assert copy.wait().tolist() == [5, 10]
    assert device.calls == [
        "Event", "current_stream", "Event.record", "Event", "stream", "Stream.wait_event",
        "Event.record", "Event.query", "Event.synchronize",
    ]  # fmt: skip


def test_pinned_memory_is_used_again_once_it_was_read(device) -> None:
    copier = copier_of(device)
    state = device.tensor([7] * 100)
    with device.running():
        for _ in range(20):
            first, second = copier.copy(state), copier.copy(state[:3])
            assert first.wait().tolist() == [7] * 100
            assert first.wait().tolist() == [7] * 100
            assert second.wait().tolist() == [7] * 3
    assert len(device.pinned) == 2
    with device.running():
        unread = [copier.copy(state) for _ in range(3)]
        device.run_all()
        assert all(copy.is_done() for copy in unread)
        copier.copy(state)
    assert len(device.pinned) == 2 + 3


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_every_shape_and_type_travels(shape, dtype) -> None:
    device = FakeStreams(cuda_api(), random.Random(1))
    copier = copier_of(device)
    values = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    ours = device.adopt(values.clone())
    with device.running():
        found = copier.copy(ours).wait()
        turned = copier.copy(ours.t() if len(shape) == 2 else ours).wait()
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert torch.equal(turned, values.t() if len(shape) == 2 else values)


def test_a_device_that_fails_is_an_engine_error(device) -> None:
    copier = copier_of(device)
    state = device.tensor([1])
    with device.running():
        copy = copier.copy(state)
        device.broken = "an illegal memory access was encountered"
        with pytest.raises(EngineError, match="before a result was there: an illegal memory"):
            copy.wait()
        with pytest.raises(EngineError, match="could not begin: an illegal memory"):
            copier.copy(state)
        with pytest.raises(EngineError, match="before a result was there"):
            copier.close()
    copier.close()


def test_what_is_uploaded_may_change_at_once(device) -> None:
    ours, host = device.tensor([0, 0]), torch.tensor([3, 4])
    with device.running():
        found = upload_pinned(host, CPU, ours, device.pinned_bytes)
        host.fill_(9)
        ours.add_(1)
        assert found is ours
        assert ours.tolist() == [0, 0]
        device.run_all()
    assert ours.tolist() == [4, 5]
    new = upload_pinned(host, CPU, None, lambda num: torch.zeros(num, dtype=torch.uint8))
    assert new.tolist() == [9, 9]


def test_on_a_cpu_a_copy_is_there_at_once() -> None:
    copier = InstantCopier()
    state = torch.tensor([1, 2])
    copy = copier.copy(state)
    state.add_(1)
    assert copy.is_done()
    assert copy.wait().tolist() == [1, 2]
    copier.close()


def test_what_is_not_ordered_is_found(device) -> None:
    """The fake itself: a copy that does not wait for the computing stream goes wrong."""
    wrong = set()
    for seed in range(20):
        device.rng.seed(seed)
        state = device.tensor([1])
        side = device.Stream(device=CPU)
        host = device.pinned_bytes(8).view(torch.int64)
        with device.running():
            state.add_(1)
            with device.stream(side):
                host.copy_(state, non_blocking=True)
            device.run_all()
        wrong.add(host.item())
    assert wrong == {1, 2}


def test_what_is_let_go_too_early_is_found(device) -> None:
    side, host = device.Stream(device=CPU), device.pinned_bytes(8).view(torch.int64)
    with device.running():
        state = device.tensor([1])
        with device.stream(side):
            host.copy_(state, non_blocking=True)
        del state
        with pytest.raises(AssertionError, match="let go before"):
            device.run_all()


def test_a_call_with_other_parameters_is_found(device) -> None:
    for wrong in ({"nonsense": 1}, {"device": CPU, "stream": 3}):
        with pytest.raises(TypeError):
            device.Stream(**wrong)
    with pytest.raises(TypeError):
        device.graph()
