"""Several native models over one memory: each draws what it draws alone, whoever had the pages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import structlog.testing
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import KERNELS, native_settings, random_prompts
from tests.worker.shared_models import SharedModels
from xllm.config.scheduling import SchedulerSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.sampling import SamplingParams
from xllm.worker.factory import make_executor
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.sharing import SharedPages, fit_block

SCHEDULING = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models of other shapes and types: what one writes is any number to the other."""
    base = tmp_path_factory.mktemp("models")
    large = make_model("qwen3", base / "large", num_hidden_layers=3)
    small = make_model("llama", base / "small", dtype="bfloat16", seed=1, num_hidden_layers=1)
    return large, small


def settings_of(first: Path, *more: Path, **worker: object) -> Settings:
    settings = native_settings(first, **worker)
    model = dataclasses.replace(
        settings.model, more=",".join(str(path) for path in more), max_model_len=200
    )
    return dataclasses.replace(settings, model=model, scheduler=SCHEDULING)


def ask(models: SharedModels, model: str, seed: int) -> None:
    for index, ids in enumerate(random_prompts(5, 3, 90, seed=seed)):
        asked = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)
        models.admit(model, f"{seed}-{index}", ids, asked)


def alone(directory: Path, seeds: tuple[int, ...], **worker: object) -> dict[tuple, list[int]]:
    models = SharedModels(make_executor(settings_of(directory, **worker)), SCHEDULING)
    for seed in seeds:
        ask(models, directory.name, seed)
        models.run()
    models.executor.close()
    return models.streams


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv_memory", ["xtensor", "paged"])
def test_models_draw_what_they_draw_alone(
    directories: tuple[Path, Path], kernels: str, kv_memory: str
) -> None:
    large, small = directories
    how = {"kernels": kernels, "kv_memory": kv_memory}
    want = alone(large, (1, 2), **how) | alone(small, (1, 2), **how)
    both = settings_of(large, small, **how, kv_cache_bytes=16 * 24576)
    models = SharedModels(make_executor(both), SCHEDULING)
    for seed in (1, 2):
        for directory in directories:
            ask(models, directory.name, seed)
        models.run()
        for one in models.executor._models.values():
            one.check()
    assert models.streams == want
    assert sum(one.statistics().num_evictions for one in models.schedulers.values()) > 0
    models.executor.close()


def test_a_context_for_all_is_cut_to_a_model_that_has_less(tmp_path: Path) -> None:
    large = make_model("qwen3", tmp_path / "large")
    small = make_model("qwen3", tmp_path / "small", max_position_embeddings=64)
    with structlog.testing.capture_logs() as logs:
        executor = make_executor(settings_of(large, small))
        ready = executor.load(lambda done, total: None)
    executor.close()
    assert [one.max_model_len for one in (ready, *ready.more)] == [200, 64]
    (line,) = [line for line in logs if line["event"] == "context_cut_to_model"]
    assert (line["model"], line["asked"], line["max_model_len"]) == ("small", 200, 64)


def test_a_model_wakes_as_it_fell_asleep(directories: tuple[Path, Path]) -> None:
    large, small = directories
    want = alone(large, (1,)) | alone(small, (1,))
    models = SharedModels(make_executor(settings_of(large, small)), SCHEDULING)
    host = models.executor
    for drop_weights in (False, True):
        for directory in directories:
            ask(models, directory.name, 1)
        models.run()
        assert models.streams == want
        models.streams.clear()
        models.sleep("large", drop_weights)
        assert (host._models["large"]._engine is None) == drop_weights
        ask(models, "small", 1)
        models.run()
        models.streams.clear()
        models.sleep("small", drop_weights)
        models.memory.check()
        for name in ("large", "small"):
            models.wake(name)
    for directory in directories:
        ask(models, directory.name, 1)
    models.run()
    assert models.streams == want
    host.close()


def test_memory_goes_back_to_the_machine_once_all_sleep() -> None:
    block = BlockLayout(1, 16, 2, 2, 16, 4)
    pages = SharedPages(2)
    for _ in range(2):
        pages.ask(block, 4, 64)
    first, second = (pages.memory(block, torch.float32, 0, 1 << 20) for _ in range(2))
    ones = torch.ones(16, 2, 16)
    first.write(0, torch.arange(16), ones, ones)
    assert first.resident_bytes() > 0
    pages.give_back()
    assert first.resident_bytes() == second.resident_bytes() == 0
    assert not bool(first.keys(0).any())
    assert not bool(second.keys(0).any())


def test_pages_are_as_large_as_the_largest_block() -> None:
    large = BlockLayout(1, 16, 4, 4, 32, 4)
    small = BlockLayout(1, 16, 1, 2, 32, 4)
    page = large.block_bytes
    assert page == 4 * small.block_bytes * 2
    fitted = fit_block(small, page)
    assert (fitted.block_size, fitted.block_bytes, fitted.wasted_bytes) == (128, page, 0)
    odd = fit_block(dataclasses.replace(small, num_layers=3), page)
    assert odd.block_size == 32
    assert 0 < odd.wasted_bytes < page // 2
    tiny = fit_block(BlockLayout(1, 16, 1, 1, 1, 4), 1 << 20)
    assert (tiny.block_size, tiny.block_bytes) == (256, 1 << 20)
    pages = SharedPages(2)
    pages.ask(large, 4, 64)
    pages.ask(small, 4, 64)
    with pytest.raises(ConfigError, match="too few for 2 models"):
        pages.memory(large, torch.float32, 3 * page, 1 << 30)
