"""What people are told of a machine's devices."""

from __future__ import annotations

from xllm.errors import DependencyError, EngineError
from xllm.worker.platform import listing
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.listing import FoundDevice, list_devices


class TwoGpus(CpuPlatform):
    """A platform of a machine that has two devices."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.device = f"cuda:{rank % 2}"

    def describe(self) -> str:
        return f"a GPU at {self.device}"

    def virtual_driver(self) -> None:
        if self.device == "cuda:1":
            raise EngineError("cuda:1 has no virtual memory management")


def select(kind: str, rank: int = 0) -> CpuPlatform:
    match kind:
        case "cpu":
            return CpuPlatform()
        case "cuda":
            return TwoGpus(rank)
    raise DependencyError("no torch_npu")


def test_every_device_and_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(listing, "make_platform", select)
    cpu, first, second, npu = list_devices()
    assert (cpu.kind, cpu.is_there) == ("cpu", True)
    assert cpu.text.endswith("virtual memory of the system")
    assert first.text.startswith("a GPU at cuda:0, ")
    assert second.text.endswith("no virtual memory: cuda:1 has no virtual memory management")
    assert npu == FoundDevice("npu", False, "no torch_npu")


def test_a_driver_that_does_not_answer(monkeypatch) -> None:
    def broken(kind: str, rank: int = 0) -> CpuPlatform:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()\nmore")

    monkeypatch.setattr(listing, "make_platform", broken)
    assert [device.is_there for device in list_devices()] == [False] * 3
    assert list_devices()[1].text == "Unexpected error from cudaGetDeviceCount()"
