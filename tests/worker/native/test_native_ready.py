"""What a loaded executor reports, and how settings and model meet in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import GREEDY, PlanDriver, native_settings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan, WorkerReady
from xllm.worker.execution.native import make_native_executor
from xllm.worker.factory import make_executor


def ready_of(settings: Settings) -> WorkerReady:
    executor = make_executor(settings)
    ready = executor.load(lambda loaded, total: None)
    executor.close()
    return ready


def with_model(settings: Settings, **fields: object) -> Settings:
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **fields))


def test_the_tighter_length_counts(tmp_path: Path) -> None:
    settings = native_settings(make_model("qwen3", tmp_path))
    assert ready_of(settings).max_model_len == 1024
    assert ready_of(with_model(settings, max_model_len=300)).max_model_len == 300
    assert ready_of(with_model(settings, max_model_len=1024)).max_model_len == 1024


def test_ids_beyond_the_vocabulary_end_no_text(tmp_path: Path) -> None:
    """They are never drawn, and min_tokens has nothing to mask."""
    directory = make_model("qwen3", tmp_path, eos_token_id=[7, 512, 151643])
    assert ready_of(native_settings(directory)).eos_ids == (510, 508, 7)


def test_the_name_is_the_settings_or_the_directorys(tmp_path: Path) -> None:
    settings = native_settings(make_model("qwen3", tmp_path / "little-model"))
    assert ready_of(settings).model == "little-model"
    assert ready_of(with_model(settings, name="other")).model == "other"


def test_windows_are_groups_of_their_own(tmp_path: Path) -> None:
    directory = make_model("qwen2", tmp_path, use_sliding_window=True)
    groups = ready_of(native_settings(directory)).kv_groups
    assert [(g.name, g.window, g.num_layers, g.bytes_per_token) for g in groups] == [
        ("full", 0, 1, 256),
        ("window-16", 16, 2, 512),
    ]


def test_kv_is_no_larger_than_the_sequences_could_use(tmp_path: Path) -> None:
    settings = native_settings(make_model("qwen3", tmp_path), kv_cache_bytes=0)
    settings = with_model(settings, max_model_len=64)
    # 32 sequences of four blocks, and one each to spare.
    assert ready_of(settings).num_blocks == 32 * 5


def test_fingerprints_tell_types_and_modes_apart(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    plain = native_settings(directory)
    found = {
        ready_of(plain).fingerprint,
        ready_of(with_model(plain, dtype="bfloat16")).fingerprint,
        ready_of(native_settings(directory, deterministic=True)).fingerprint,
        ready_of(native_settings(directory, num_threads=2)).fingerprint,
    }
    assert len(found) == 4
    assert ready_of(plain).fingerprint in found


def test_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        make_native_executor(Settings(model=ModelSettings())).load(lambda loaded, total: None)


def test_a_second_load_starts_anew(tmp_path: Path) -> None:
    driver = PlanDriver(make_model("qwen3", tmp_path))
    first = driver.ready
    job = driver.job([4, 5, 6], 2)
    driver.step([job])
    again = driver.executor.load(lambda loaded, total: None)
    assert equal_but_for_time(again, first)
    decode = StepItem(job.seq, ItemKind.DECODE, 3, 1)
    ((index, reason),) = driver.run([decode]).result.failed
    assert index == 0
    assert "is not known here" in reason


def test_a_closed_executor_runs_nothing(tmp_path: Path) -> None:
    driver = PlanDriver(make_model("qwen3", tmp_path))
    driver.executor.close()
    plan = StepPlan(
        1,
        (StepItem(1, ItemKind.PREFILL, 0, 1),),
        (NewSequence(1, (5,), (), GREEDY, 0, (0,)),),
    )
    with pytest.raises(EngineError, match="not loaded"):
        driver.executor.execute(plan)


def equal_but_for_time(one: WorkerReady, two: WorkerReady) -> bool:
    """Equal but for the time it took."""
    return all(
        getattr(one, name) == getattr(two, name)
        for name in one.__struct_fields__
        if name != "load_s"
    )


def test_warming_up_leaves_no_trace(tmp_path: Path) -> None:
    driver = PlanDriver(make_model("qwen3", tmp_path))
    pool = driver.executor._loaded().pool
    assert all(not pool.keys(layer).any() and not pool.values(layer).any() for layer in range(3))
