"""Quantized models: how far their logits are from the others', the same tokens however a prompt
is computed, and what refuses."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, native_settings, random_prompts
from xllm.errors import ConfigError
from xllm.worker.attention.plan import Span
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.kernels.compiled import load

DEMO = Path(__file__).parents[3] / "xllm" / "demo" / "model"
QUANTIZATIONS = ("int8", "int4", "w8a8")
LENGTH = 90

needs_library = pytest.mark.skipif(load().compiled is None, reason=load().reason)


def logits_of(driver: PlanDriver, ids: list[int]) -> torch.Tensor:
    """Of all positions of a text."""
    engine = driver.executor._loaded()
    size = driver.ready.block_size
    span = Span(0, len(ids), array("q", range(-(-len(ids) // size))))
    with torch.inference_mode():
        return engine.loop._model.head(engine.loop.run([span], ids, ()))


@needs_library
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama2", "qwen3-moe"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_logits_are_near(family: str, stored: str, quantization: str, tmp_path: Path) -> None:
    if stored != "bfloat16" and family != "qwen3":
        return
    directory = make_model(family, tmp_path / "model", dtype=stored)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    plain, rounded = PlanDriver(directory), PlanDriver(directory, quantization)
    want, got = logits_of(plain, ids), logits_of(rounded, ids)
    error = float((got - want).norm() / want.norm())
    assert error < {"int8": 0.05, "w8a8": 0.1, "int4": 0.5}[quantization]
    assert error > 1e-4  # it is another model
    rounded.executor.close()


@needs_library
@pytest.mark.parametrize("kv_memory", ["xtensor", "paged"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantization", ["none", *QUANTIZATIONS])
def test_tokens_do_not_depend_on_chunks_neighbours_and_prefixes(
    quantization: str, kv_dtype: str, kv_memory: str
) -> None:
    driver = PlanDriver(DEMO, quantization, kv_dtype=kv_dtype, kv_memory=kv_memory)
    check_tokens(driver)
    driver.executor.close()


def check_tokens(driver: PlanDriver) -> None:
    """The same tokens alone, in chunks beside others, and behind a cached prefix."""
    prompts = [[*prompt] for prompt in random_prompts(6, 30, 120)]
    whole = [driver.job(prompt, 12) for prompt in prompts]
    for job in whole:
        driver.generate([job])
    chunked = [driver.job(prompt, 12) for prompt in prompts]
    driver.generate(chunked, chunk=17, stagger=2)
    size = driver.ready.block_size
    hits = [
        driver.job(job.prompt, 12, cached=job.blocks[: (len(job.prompt) - 1) // size])
        for job in whole
    ]
    driver.generate(hits)
    assert [job.output for job in chunked] == [job.output for job in whole]
    assert [job.output for job in hits] == [job.output for job in whole]


@needs_library
@pytest.mark.parametrize("family", ["mistral-window", "qwen3"])
def test_rounded_kv_changes_logits_little(family: str, tmp_path: Path) -> None:
    directory = make_model(family, tmp_path / "model")
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    plain, rounded = PlanDriver(directory), PlanDriver(directory, kv_dtype="int8")
    want, got = logits_of(plain, ids), logits_of(rounded, ids)
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 0.03
    assert rounded.ready.num_blocks > plain.ready.num_blocks * 1.5
    (group,), (plain_group,) = rounded.ready.kv_groups, plain.ready.kv_groups
    assert group.bytes_per_token < plain_group.bytes_per_token


@needs_library
def test_an_instance_says_what_is_rounded() -> None:
    seen = {}
    asked = [(quantization, "auto") for quantization in ("none", *QUANTIZATIONS)]
    for quantization, kv_dtype in [*asked, ("none", "int8"), ("int8", "int8")]:
        driver = PlanDriver(DEMO, quantization, dtype="bfloat16", kv_dtype=kv_dtype)
        seen[driver.ready.fingerprint] = driver.ready.dtype
        driver.executor.close()
    assert list(seen.values()) == [
        "bfloat16",
        "bfloat16+int8",
        "bfloat16+int4",
        "bfloat16+w8a8",
        "bfloat16+kv-int8",
        "bfloat16+int8+kv-int8",
    ]


@needs_library
def test_quantized_weights_take_less_memory(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path / "model", dtype="bfloat16")
    sizes = []
    for quantization in ("none", "int8", "int4"):
        driver = PlanDriver(directory, quantization)
        sizes.append(driver.executor._loaded().num_bytes)
        driver.executor.close()
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_without_compiled_kernels_it_is_refused(quantization: str) -> None:
    executor = NativeExecutor(native_settings(DEMO, quantization, kernels="torch"))
    with pytest.raises(ConfigError, match=f"model.quantization: {quantization} needs"):
        executor.load(lambda loaded, total: None)
    executor = NativeExecutor(native_settings(DEMO, kernels="torch", kv_dtype="int8"))
    with pytest.raises(ConfigError, match=r"worker\.kv_dtype: int8 needs"):
        executor.load(lambda loaded, total: None)


@needs_library
def test_transformers_takes_rounded_kv_but_no_rounded_weights(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path / "model")
    asked = native_settings(directory, "int8")
    model = dataclasses.replace(asked.model, implementation="transformers")
    executor = NativeExecutor(dataclasses.replace(asked, model=model))
    with pytest.raises(ConfigError, match="int8 is for native models"):
        executor.load(lambda loaded, total: None)
    asked = native_settings(directory, kv_dtype="int8")
    asked = dataclasses.replace(asked, model=dataclasses.replace(model, quantization="none"))
    library = PlanDriver(directory)
    library.executor = NativeExecutor(asked)
    library.ready = library.executor.load(lambda loaded, total: None)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    got, want = logits_of(library, ids), logits_of(PlanDriver(directory), ids)
    assert float((got - want).norm() / want.norm()) < 0.03
