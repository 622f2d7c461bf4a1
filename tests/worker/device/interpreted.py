"""A device that is the host: virtual memory that refuses what a driver refuses, kernels in Triton's
interpreter, graphs that are replayed, and results that are on their way until somebody waits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from tests.worker.device.recorded_graphs import RecordedGraphs
from tests.worker.device.reference_ops import ReferenceDraws, ReferenceOps
from tests.worker.graphs.fake_graphs import FakeGraphs
from tests.worker.native.plan_driver import PlanDriver, native_settings
from tests.worker.platform.host_device import FakeDriver, HostDevice
from tests.worker.triton_interpreter import DEVICE
from xllm.worker.execution.device import making, runner
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.graphs import GraphDevice


class LateCopy:
    """There once somebody waits, and not before: whoever reads too early is found out."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.clone()
        self._is_done = False

    def is_done(self) -> bool:
        return self._is_done

    def wait(self) -> torch.Tensor:
        self._is_done = True
        return self._tensor


class LateCopier:
    """A HostCopier of late copies."""

    def copy(self, tensor: torch.Tensor) -> LateCopy:
        return LateCopy(tensor)

    def close(self) -> None:
        pass


class InterpretedPlatform(CpuPlatform):
    """A CPU that is treated as an accelerator."""

    kernels = "triton"

    def __init__(
        self, failing: set[str] | None = None, graphs: RecordedGraphs | None = None
    ) -> None:
        super().__init__()
        self.device = DEVICE
        self.host = HostDevice()
        self.graph_device: GraphDevice = graphs or FakeGraphs(failing)

    def copier(self) -> LateCopier:
        return LateCopier()

    def graphs(self) -> GraphDevice:
        return self.graph_device

    def virtual_driver(self) -> FakeDriver:
        return FakeDriver(self.host)


def interpreted_driver(
    monkeypatch,
    directory: Path,
    platform: InterpretedPlatform | None = None,
    *,
    reference: bool = True,
    max_num_seqs: int = 32,
    draft_tokens: int = 0,
    **worker,
) -> PlanDriver:
    """A driver of the native executor on that platform, with its model loaded. `reference`: the
    kernels are those of `reference_ops`; else ours, interpreted. `draft_tokens`: of a sequence and
    step at most, whoever guesses them."""
    chosen = platform or InterpretedPlatform()
    monkeypatch.setattr(
        "xllm.worker.execution.reading.select_platform", lambda device, rank=0: chosen
    )
    if reference:
        monkeypatch.setattr(f"{making.__name__}.TritonOps", ReferenceOps)
        monkeypatch.setattr(f"{making.__name__}.DeviceSampler", ReferenceDraws)
    # What is captured when must not hang on how fast this machine is.
    monkeypatch.setattr(f"{runner.__name__}.CAPTURE_SHARE", 1.0)
    settings = native_settings(directory, **{"kernels": "torch", "block_size": 16, **worker})
    scheduler = dataclasses.replace(settings.scheduler, max_num_seqs=max_num_seqs)
    if draft_tokens:
        scheduler = dataclasses.replace(
            scheduler, drafting="prompt-lookup", draft_tokens=draft_tokens
        )
    settings = dataclasses.replace(settings, scheduler=scheduler)
    return PlanDriver(directory, executor=NativeExecutor(settings))
