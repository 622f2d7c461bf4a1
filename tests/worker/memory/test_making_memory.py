"""How much KV memory is made of what a device has."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.models import make_model
from xllm.config.master import MasterSettings
from xllm.config.scheduling import SchedulerSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.memory.making import make_memory
from xllm.worker.models.registry import find_family
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.platform import DeviceMemory


class Machine(CpuPlatform):
    """Eight MiB, half of them free."""

    def memory(self) -> DeviceMemory:
        return DeviceMemory(4 << 20, 8 << 20)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    raw = read_config(make_model("qwen3", tmp_path_factory.mktemp("kv") / "model"))
    return find_family(raw.architecture()).read(raw)


def kv_bytes(config: ModelConfig, **fields: object) -> int:
    settings = Settings(
        scheduler=SchedulerSettings(max_num_seqs=32),
        worker=WorkerSettings(kv_cache_bytes=fields.pop("asked", 0)),
        master=MasterSettings(**fields),
    )
    memory = make_memory(settings, config, torch.float32, Machine(), 1024)
    return memory.layout.num_blocks * memory.layout.block_bytes


def test_ranks_on_one_host_take_together_what_one_would(config: ModelConfig) -> None:
    block = kv_block(config)
    assert kv_bytes(config) == (1 << 20) // block * block
    assert kv_bytes(config, num_workers=2) == (1 << 19) // block * block
    assert kv_bytes(config, num_workers=2, spawn_workers=False) == kv_bytes(config)


def kv_block(config: ModelConfig) -> int:
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    return -(-16 * token // 4096) * 4096


def test_what_is_asked_for_must_be_free(config: ModelConfig) -> None:
    assert kv_bytes(config, asked=4 << 20) == (4 << 20) // kv_block(config) * kv_block(config)
    with pytest.raises(ConfigError, match=r"4194305 bytes .* has 4194304 free of 8388608"):
        kv_bytes(config, asked=(4 << 20) + 1)
