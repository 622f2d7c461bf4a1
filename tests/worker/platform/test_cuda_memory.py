"""Virtual memory of a real GPU, through the real driver; what the fakes take for granted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from xllm.errors import EngineError
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.platform.cuda import CudaPlatform

pytestmark = pytest.mark.gpu


@pytest.fixture
def platform() -> CudaPlatform:
    platform = CudaPlatform()
    platform.prepare(0, 0)
    return platform


def open_memory(platform: CudaPlatform, num_blocks: int = 16) -> DeviceKvMemory:
    driver = platform.virtual_driver()
    layout = DeviceLayout(num_blocks, 128, 4, 8, 128, 2, driver.granularity)
    return DeviceKvMemory(layout, torch.bfloat16, driver)


def test_slots_and_pool_are_one_memory_whoever_maps(platform: CudaPlatform) -> None:
    memory = open_memory(platform)
    layout, driver = memory.layout, platform.virtual_driver()
    assert driver.granularity == 2 << 20
    assert not memory.keys(3).any()
    space = SlotSpace(
        memory.slot_memory(),
        num_slots=4,
        pages_per_slot=8,
        page_bytes=layout.block_bytes,
        num_pages=layout.num_blocks,
    )
    thread = threading.Thread(target=space.map, args=(2, 0, (5, 6, 3)))
    thread.start()
    thread.join()
    space.map(1, 0, (5,))
    for block in (3, 5, 6):
        memory.values(1)[block] = block
    seen = driver.tensor(space.address(2), 3 * layout.block_bytes).view(torch.bfloat16)
    numbers = seen.view(3, layout.block_numbers)
    first = layout.layer_numbers + layout.value_numbers
    assert numbers[:, first : first + 64].float().mean(1).tolist() == [5, 6, 3]
    shared = driver.tensor(space.address(1), layout.block_bytes).view(torch.bfloat16)
    assert shared[first].item() == 5
    space.map(2, 1, (7, 8))
    seen = driver.tensor(space.address(2), 3 * layout.block_bytes).view(torch.bfloat16)
    memory.values(1)[8] = 8
    assert seen.view(3, layout.block_numbers)[2, first].item() == 8
    platform.synchronize()
    space.close()
    memory.close()


def test_what_the_driver_refuses(platform: CudaPlatform) -> None:
    driver = platform.virtual_driver()
    unit = driver.granularity
    base, two = driver.reserve(4 * unit), driver.create(2 * unit)
    driver.map(base, 2 * unit, two)
    for refused in (
        lambda: driver.map(base, 2 * unit, two),
        lambda: driver.unmap(base, unit),
        lambda: driver.create(unit // 2),
        lambda: driver.create(1 << 50),
    ):
        with pytest.raises(EngineError, match=r"cuMem.*CUDA_ERROR_"):
            refused()
    driver.release(two)
    driver.unmap(base, 2 * unit)
    driver.free_range(base, 4 * unit)


def test_memory_goes_back_to_the_device_and_comes_again(platform: CudaPlatform) -> None:
    memory = open_memory(platform, 64)
    held = memory.held_bytes
    platform.synchronize()
    before = platform.memory().free_bytes
    memory.give_back()
    assert platform.memory().free_bytes >= before + held * 9 // 10
    memory.take_back()
    assert not memory.keys(0).any()
    platform.synchronize()
    memory.close()
    assert platform.memory().free_bytes >= before + held * 9 // 10


def test_the_peak_is_within_a_twentieth_of_the_plan(tmp_path: Path) -> None:
    directory = make_model(
        "qwen3",
        tmp_path / "model",
        dtype="bfloat16",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated()
    with capture_logs() as lines:
        driver = PlanDriver(directory, device="cuda", kv_cache_bytes=1 << 30)
    plan = next(line for line in lines if line["event"] == "memory_plan")
    jobs = [driver.job(prompt, 4) for prompt in random_prompts(16, 120, 128)]
    while not all(job.done for job in jobs):
        driver.step(jobs)
    pool = driver.executor._loaded().pool
    # What the driver gave to blocks is in no statistics of torch.
    held = pool.held_bytes if isinstance(pool, DeviceKvMemory) else 0
    peak = torch.cuda.max_memory_allocated() - others + held
    driver.executor.close()
    assert abs(peak - plan["total_bytes"]) <= plan["total_bytes"] / 20
