"""The platforms of GPUs and NPUs over fakes of their modules: every call exists as it is made."""

from __future__ import annotations

import importlib.machinery
import random
import types
from typing import Any

import pytest
import torch

from tests.worker.platform.device_api import DeviceApi, cuda_api, npu_api, npu_versions
from tests.worker.platform.fake_streams import FakeStreams
from xllm.errors import DependencyError
from xllm.worker.platform import cuda, npu, pinned
from xllm.worker.platform.cuda import CudaPlatform
from xllm.worker.platform.npu import NpuPlatform, npu_available
from xllm.worker.platform.platform import Platform
from xllm.worker.platform.selection import select_platform

EXACT = (
    "allow_tf32",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


class FakeModule(FakeStreams):
    """And what torch.cuda and torch.npu tell of the devices."""

    num_devices = 3
    capability = (9, 0)

    def __init__(self, api: DeviceApi, graph_class: str) -> None:
        super().__init__(api, random.Random(0), graph_class)
        self.device: torch.device | None = None
        self.cached = 1 << 20
        self.products = types.SimpleNamespace()  # how exact they are

    def is_available(self, *args: Any, **kwargs: Any) -> bool:
        self.check("is_available", args, kwargs)
        return self.num_devices > 0

    def device_count(self, *args: Any, **kwargs: Any) -> int:
        self.check("device_count", args, kwargs)
        return self.num_devices

    def set_device(self, *args: Any, **kwargs: Any) -> None:
        self.check("set_device", args, kwargs)
        self.device = args[0]

    def mem_get_info(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.check("mem_get_info", args, kwargs)
        return (64 << 20) - self.cached, 80 << 20

    def empty_cache(self, *args: Any, **kwargs: Any) -> None:
        self.check("empty_cache", args, kwargs)
        self.cached = 0

    def get_device_name(self, *args: Any, **kwargs: Any) -> str:
        self.check("get_device_name", args, kwargs)
        return "A Device"

    def get_device_capability(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.check("get_device_capability", args, kwargs)
        return self.capability


def stand_in(module: FakeModule) -> types.SimpleNamespace:
    """torch as the platform sees it, with a device that this build knows."""
    return types.SimpleNamespace(
        cuda=module,
        npu=module,
        backends=types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=module.products)),
        __version__=torch.__version__,
        device=lambda kind, index: torch.device({"npu": "privateuseone"}.get(kind, kind), index),
    )


@pytest.fixture
def gpu(monkeypatch) -> FakeModule:
    module = FakeModule(cuda_api(), "CUDAGraph")
    monkeypatch.setattr(cuda, "torch", stand_in(module))
    return module


@pytest.fixture(params=npu_versions())
def ascend(request, monkeypatch) -> FakeModule:
    module = FakeModule(npu_api(request.param), "NPUGraph")
    monkeypatch.setattr(npu, "torch", stand_in(module))
    monkeypatch.setattr(npu.importlib, "import_module", lambda name: {"torch_npu": module}[name])
    return module


def check_memory(platform: Platform, module: FakeModule) -> None:
    platform.prepare(4, 1 << 30)
    assert module.device == platform.device
    memory = platform.memory()
    assert (memory.free_bytes, memory.total_bytes) == (63 << 20, 80 << 20)
    assert platform.kv_budget() == int((64 << 20) * 0.85)


def check_work(platform: Platform, module: FakeModule, monkeypatch) -> None:
    """A step: values go up, a graph computes, the result comes back, a mark says how far it is."""

    def empty(num_bytes: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert (dtype, pin_memory) == (torch.uint8, True)
        return module.pinned_bytes(num_bytes)

    torch_with_pins = types.SimpleNamespace(empty=empty, uint8=torch.uint8)
    monkeypatch.setattr(pinned, "torch", torch_with_pins)
    state = module.tensor([0, 0])
    with module.running():
        graphs, copier = platform.graphs(), platform.copier()
        assert graphs is not None
        platform.upload(torch.tensor([4, 5]), state)
        graph = graphs.capture(lambda: state.mul_(2))
        graph.replay()
        copy, mark = copier.copy(state), platform.mark()
        assert mark is not None
        assert not mark()
        assert copy.wait().tolist() == [16, 20]
        platform.synchronize()
        assert mark()
        copier.close()
        graphs.close()


def test_a_gpu(gpu, monkeypatch) -> None:
    platform = CudaPlatform(rank=4)
    assert platform.device == torch.device("cuda", 1)
    assert (platform.name, platform.collectives) == ("cuda", "nccl")
    check_memory(platform, gpu)
    check_work(platform, gpu, monkeypatch)
    assert platform.describe() == "cuda (A Device)"
    assert platform.fingerprint()[:3] == ("cuda", "A Device", "sm-90")
    assert vars(gpu.products) == dict.fromkeys(EXACT, False)
    assert select_platform("cuda").device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "has_triton", "kernels"),
    [((9, 0), True, "triton"), ((8, 0), True, "triton"), ((7, 5), True, "torch"),
     ((9, 0), False, "torch")],
)  # fmt: skip
def test_whose_kernels_a_gpu_runs(gpu, monkeypatch, capability, has_triton, kernels) -> None:
    spec = importlib.machinery.ModuleSpec("triton", None) if has_triton else None
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: spec)
    gpu.capability = capability
    assert CudaPlatform().kernels == kernels


def test_no_gpu(gpu) -> None:
    gpu.num_devices = 0
    with pytest.raises(DependencyError, match=r"^torch sees no GPU"):
        CudaPlatform()
    with pytest.raises(DependencyError, match=r"^worker\.device is cuda, but torch sees") as asked:
        select_platform("cuda")
    assert asked.value.param == "worker.device"


def test_an_npu(ascend, monkeypatch) -> None:
    platform = NpuPlatform(rank=5)
    assert platform.device == torch.device("privateuseone", 2)
    assert (platform.name, platform.kernels, platform.collectives) == ("npu", "torch", "hccl")
    check_memory(platform, ascend)
    check_work(platform, ascend, monkeypatch)
    assert platform.describe() == "npu (A Device)"
    assert platform.fingerprint()[:2] == ("npu", "A Device")


def test_no_npu(ascend, monkeypatch) -> None:
    spec = importlib.machinery.ModuleSpec("torch_npu", None)
    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: spec)
    assert npu_available()
    ascend.num_devices = 0
    assert not npu_available()
    with pytest.raises(DependencyError, match="the CANN driver is needed"):
        NpuPlatform()


def test_a_torch_npu_without_graphs(ascend) -> None:
    del ascend.NPUGraph
    assert NpuPlatform().graphs() is None
