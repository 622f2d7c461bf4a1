"""Quantized models: how far their logits are from the others', the same tokens however a prompt
is computed, and what refuses."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, native_settings, random_prompts
from xllm.errors import ConfigError
from xllm.worker.attention.plan import Span
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.kernels.library import load

DEMO = Path(__file__).parents[3] / "xllm" / "demo" / "model"
QUANTIZATIONS = ("int8", "int4", "w8a8")
LENGTH = 90

needs_library = pytest.mark.skipif(load().library is None, reason=load().reason)


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
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_tokens_do_not_depend_on_chunks_neighbours_and_prefixes(quantization: str) -> None:
    driver = PlanDriver(DEMO, quantization)
    prompts = [[*prompt] for prompt in random_prompts(6, 30, 120)]
    whole = [driver.job(prompt, 12) for prompt in prompts]
    for job in whole:
        driver.generate([job])
    chunked = [driver.job(prompt, 12) for prompt in prompts]
    driver.generate(chunked, chunk=17, stagger=2)
    size = driver.ready.block_size
    shared = [job.blocks[: len(job.prompt) // size] for job in whole]
    hits = [
        driver.job(prompt, 12, cached=blocks[: (len(prompt) - 1) // size])
        for prompt, blocks in zip(prompts, shared, strict=True)
    ]
    driver.generate(hits)
    assert [job.output for job in chunked] == [job.output for job in whole]
    assert [job.output for job in hits] == [job.output for job in whole]
    driver.executor.close()


@needs_library
def test_an_instance_says_what_is_rounded() -> None:
    seen = {}
    for quantization in ("none", *QUANTIZATIONS):
        driver = PlanDriver(DEMO, quantization, dtype="bfloat16")
        seen[driver.ready.fingerprint] = driver.ready.dtype
        driver.executor.close()
    assert list(seen.values()) == [
        "bfloat16",
        "bfloat16+int8",
        "bfloat16+int4",
        "bfloat16+w8a8",
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
