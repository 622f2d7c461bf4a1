"""The native engine over a device's virtual memory, with a fake driver: the tokens of block tables,
the same numbers in slots and in the pool, and memory that goes back when it should.

torch computes on the host here and reads by block tables; `run` compares what is under the slots
with them through the real addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.test_native_scheduler import Instance
from tests.worker.native.test_native_slots import OverlappedInstance, run
from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.errors import EngineError
from xllm.protocol.step import MapPages, NewSequence
from xllm.worker.execution import reading
from xllm.worker.platform.cpu import CpuPlatform

PAGE = 16384


class HostPlatform(CpuPlatform):
    """Computes on the host, with the virtual memory of a device."""

    def __init__(self, device: HostDevice) -> None:
        super().__init__()
        self.host = device

    def virtual_driver(self) -> Any:
        return FakeDriver(self.host)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("device_slots"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    device = HostDevice(granularity=PAGE, total_bytes=8 << 20)
    monkeypatch.setattr(reading, "select_platform", lambda kind, rank: HostPlatform(device))
    return device


def open_driver(directory: Path, **worker: Any) -> PlanDriver:
    fields = {"kernels": "torch", "kv_cache_bytes": 2 << 20, **worker}
    return PlanDriver(directory, **fields)


@pytest.fixture(scope="module")
def by_tables(directory: Path) -> dict[tuple[str, int], list[int]]:
    """What the requests say in an engine without slots."""
    driver = open_driver(directory, kv_memory="paged")
    instance = Instance(directory, driver=driver, prefix_cache=False, max_in_flight=1)
    run(instance, 1, aborts=False)
    return instance.streams


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        (Instance, {}),
        (Instance, {"num_blocks": 18, "num_slots": 4, "max_num_batched_tokens": 37}),
        (OverlappedInstance, {}),
    ],
)
def test_the_tokens_are_those_of_block_tables(
    directory: Path,
    device: HostDevice,
    by_tables: dict[tuple[str, int], list[int]],
    kind: type[Instance],
    limits: dict[str, Any],
) -> None:
    driver = open_driver(directory)
    assert driver.ready.num_slots == 64
    instance = kind(directory, driver=driver, **limits)
    run(instance, 1, aborts=False)
    assert instance.streams == by_tables
    statistics = driver.executor.statistics()
    assert statistics.mapper.slots.num_pages_mapped > 20
    assert statistics.mapper.num_steps > 10
    driver.executor.check()
    driver.executor.close()
    assert device.left() == (0, 0, 0)


def test_an_engine_that_sleeps_has_no_memory_and_wakes_with_it(
    directory: Path, device: HostDevice, by_tables: dict[tuple[str, int], list[int]]
) -> None:
    driver = open_driver(directory)
    executor = driver.executor
    run(Instance(directory, driver=driver), 2, aborts=True)
    held = device.used_bytes
    assert held > 1 << 20
    for drop_weights in (False, True, False):
        executor.sleep("", drop_weights)
        executor.sleep("", drop_weights)
        assert device.used_bytes == 0
        taken = FakeDriver(device).create(device.total_bytes)
        with pytest.raises(Exception, match="OUT_OF_MEMORY"):
            executor.wake("", lambda done, total: None)
        with pytest.raises(EngineError, match="sleeps"):
            executor.statistics()
        assert device.used_bytes == device.total_bytes
        FakeDriver(device).release(taken)
        executor.wake("", lambda done, total: None)
        assert device.used_bytes == held
    executor.sleep("", False)
    driver.ready = executor.load(lambda done, total: None)
    instance = Instance(directory, driver=driver)
    run(instance, 1, aborts=False)
    assert instance.streams == by_tables
    executor.close()
    assert device.left() == (0, 0, 0)


def test_what_cannot_be_mapped_fails_its_sequence_and_the_others_go_on(
    directory: Path, device: HostDevice
) -> None:
    driver = open_driver(directory)
    executor = driver.executor
    jobs = [driver.job(prompt, 3) for prompt in random_prompts(2, 40, 60, seed=4)]

    def place(index: int) -> tuple[NewSequence, MapPages]:
        (told,) = driver.news([jobs[index]])
        maps = MapPages(index, 0, tuple(jobs[index].blocks))
        return msgspec.structs.replace(told, slot=index), maps

    one, first = place(0)
    output = driver.run([driver.item(jobs[0], 99)], [one], maps=(first,))
    assert output.result.failed == ()
    jobs[0].computed, jobs[0].output = len(jobs[0].prompt), list(output.result.tokens[0])
    other, second = place(1)
    device.fails_on = "map"
    items = [driver.item(jobs[0], 99), driver.item(jobs[1], 99)]
    output = driver.run(items, [other], maps=(second,))
    assert output.result.failed == ((1, "sequence 2: map: UNKNOWN"),)
    assert len(output.result.tokens[0]) == 1
    device.fails_on = ""
    executor.check()
    executor.close()
    assert device.left() == (0, 0, 0)


def test_the_start_says_what_memory_goes_to_and_what_pages_waste(
    directory: Path, device: HostDevice
) -> None:
    with capture_logs() as lines:
        driver = open_driver(directory)
    found = {line["event"]: line for line in lines}
    plan, slots = found["memory_plan"], found["kv_slots"]
    assert plan["kv_bytes"] == device.used_bytes
    assert plan["total_bytes"] == sum(
        plan[f"{part}_bytes"] for part in ("weight", "kv", "activation")
    )
    memory = driver.executor._loaded().pool
    assert slots["page_tokens"] == memory.layout.block_size == driver.ready.block_size
    assert slots["wasted_bytes_a_page"] == memory.layout.wasted_bytes
    driver.executor.close()
