"""Which memory a device gets, how large its blocks are, and what a line says where slots cannot
be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from tests.fixtures.models import make_model
from tests.worker.platform.host_device import FakeDriver, HostDevice
from xllm.config.scheduling import SchedulerSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError, DependencyError, EngineError
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.memory.making import make_memory, make_slots, max_mappings
from xllm.worker.memory.pool import KvPool
from xllm.worker.models.registry import find_family
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.device_driver import DeviceDriver
from xllm.worker.platform.platform import DeviceMemory

MODEL_LEN = 100


class Accelerator(CpuPlatform):
    """A device of 4 MiB whose tensors are the meta device's, so that none takes memory."""

    def __init__(self, driver: DeviceDriver | Exception | None) -> None:
        super().__init__()
        self.device = torch.device("meta")
        self.driver = driver

    def memory(self) -> DeviceMemory:
        return DeviceMemory(3 << 20, 4 << 20)

    def kv_budget(self) -> int:
        return 2 << 20

    def virtual_driver(self) -> Any:
        if isinstance(self.driver, Exception):
            raise self.driver
        return self.driver


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    raw = read_config(make_model("qwen3", tmp_path_factory.mktemp("kv") / "model"))
    return find_family(raw.architecture()).read(raw)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(HostDevice(granularity=32768, total_bytes=2 << 20))


def settings_of(num_tokens: int = 64, **worker: Any) -> Settings:
    scheduler = SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=num_tokens)
    return Settings(scheduler=scheduler, worker=WorkerSettings(**worker))


def make(config: ModelConfig, driver: DeviceDriver | Exception | None, **worker: Any) -> KvMemory:
    settings = settings_of(**worker)
    return make_memory(settings, config, torch.float16, Accelerator(driver), MODEL_LEN)


def test_blocks_suit_the_pages_of_the_device(config: ModelConfig, driver: FakeDriver) -> None:
    assert 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 == 768
    memory = make(config, driver)
    assert isinstance(memory, DeviceKvMemory)
    layout = memory.layout
    assert (layout.block_size, layout.block_bytes, layout.wasted_bytes) == (128, 3 * 32768, 0)
    assert layout.num_blocks == 4 * (-(-MODEL_LEN // layout.block_size) + 1)
    assert driver.device.used_bytes == layout.total_bytes
    memory.close()
    asked = make(config, driver, block_size=16)
    assert asked.layout.block_size == 16
    asked.close()


def test_what_steps_take_is_left_to_them(config: ModelConfig, driver: FakeDriver) -> None:
    # 3 MiB are free; steps of so many tokens take all but a few blocks.
    memory = make(config, driver, num_tokens=1925)
    assert memory.layout.num_blocks == 4
    memory.close()
    with pytest.raises(ConfigError, match=r"worker\.kv_cache_bytes: 0 bytes hold 0 blocks"):
        make(config, driver, num_tokens=9000)


def test_slots_over_a_devices_memory(config: ModelConfig, driver: FakeDriver) -> None:
    memory = make(config, driver)
    with capture_logs() as lines:
        space = make_slots(settings_of(), memory, MODEL_LEN)
    assert space is not None
    assert [line["event"] for line in lines] == ["kv_slots"]
    pages = -(-MODEL_LEN // memory.layout.block_size)
    assert (space.num_slots, space.pages_per_slot) == (8, pages)
    assert max_mappings(space, memory, 1) == 8 * (pages + 1)
    space.close()
    memory.close()
    assert driver.device.left() == (0, 0, 0)


@pytest.mark.parametrize(
    "error", [EngineError("no virtual memory management"), DependencyError("no cuda-bindings")]
)
def test_without_virtual_memory_there_is_a_pool_and_a_line_says_why(
    config: ModelConfig, error: Exception
) -> None:
    with capture_logs() as lines:
        memory = make(config, error)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("kv_slots_not_used", str(error))
    ]
    assert isinstance(memory, KvPool)
    assert memory.layout.block_size == 16
    assert make_slots(settings_of(), memory, MODEL_LEN) is None


def test_block_tables_are_asked_for_by_a_setting(config: ModelConfig, driver: FakeDriver) -> None:
    with capture_logs() as lines:
        memory = make(config, driver, kv_memory="paged", block_size=32)
    assert isinstance(memory, KvPool)
    assert (lines, memory.layout.block_size) == ([], 32)


def test_a_cpu_has_its_own(config: ModelConfig) -> None:
    memory = make_memory(settings_of(), config, torch.float32, CpuPlatform(), MODEL_LEN)
    assert isinstance(memory, CpuKvMemory)
    assert memory.layout.block_size == 16


def test_memory_that_is_not_there_is_an_error_of_the_setting(
    config: ModelConfig, driver: FakeDriver
) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes: .* cannot be allocated: create: OUT_"):
        make(config, driver, kv_cache_bytes=3 << 20)
    with pytest.raises(ConfigError, match="5242880 bytes were asked for, the device has 4194304"):
        make(config, driver, kv_cache_bytes=5 << 20)
    assert driver.device.left() == (0, 0, 0)


def test_a_block_that_can_be_mapped_only_once_leaves_block_tables(
    config: ModelConfig, driver: FakeDriver
) -> None:
    """What a driver may not do is found at the start."""
    memory = make(config, driver)
    driver.device.fails_on = "map"
    with capture_logs() as lines:
        assert make_slots(settings_of(), memory, MODEL_LEN) is None
    assert lines[0]["reason"] == "map: UNKNOWN"
    driver.device.fails_on = "reserve"
    with capture_logs() as lines:
        assert make_slots(settings_of(), memory, MODEL_LEN) is None
    assert lines[0]["reason"] == "reserve: UNKNOWN"
    memory.close()
    assert driver.device.left() == (0, 0, 0)
