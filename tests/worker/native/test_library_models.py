"""Models of transformers through our attention: the same logits and tokens as through their own,
and a refusal by name for those that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.fixtures.library_models import LIBRARY_MODELS, make_library_model
from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.reference import (
    LOGIT_BOUND,
    assert_greedy,
    load_reference,
    reference_logits,
)
from tests.worker.native.test_native_logits import LENGTH, Runner, check_all_ways
from xllm.errors import ConfigError

_BASE = LIBRARY_MODELS["PhiForCausalLM"]


@pytest.mark.parametrize("architecture", LIBRARY_MODELS)
def test_logits_equal_the_reference(architecture: str, tmp_path: Path) -> None:
    directory = make_library_model(architecture, tmp_path)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    want = reference_logits(load_reference(directory), ids)
    assert want.std() > 1
    runner = Runner(directory)
    check_all_ways(runner, want, ids, LOGIT_BOUND, single=architecture.startswith("Gemma2"))


@pytest.mark.parametrize(
    ("architecture", "changed"),
    [
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": None}),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 40}),
        ("Gemma3ForCausalLM", {"sliding_window": 48}),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": False}),
        ("GraniteForCausalLM", {"attention_multiplier": 0.2}),
    ],
)
def test_settings_change_logits(architecture: str, changed: dict, tmp_path: Path) -> None:
    """What the test above relies on is felt at its length."""
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    logits = []
    for name, overrides in (("one", {}), ("two", changed)):
        directory = make_library_model(architecture, tmp_path / name, **overrides)
        logits.append(reference_logits(load_reference(directory), ids))
    assert (logits[0] - logits[1]).abs().max() > 100 * LOGIT_BOUND


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "Gemma2ForCausalLM", "PhiForCausalLM", "Qwen2MoeForCausalLM"],
)
def test_greedy_tokens_of_mixed_batches(architecture: str, tmp_path: Path) -> None:
    directory = make_library_model(architecture, tmp_path)
    driver, reference = PlanDriver(directory), load_reference(directory)
    jobs = [driver.job(prompt, 64) for prompt in random_prompts(8, 1, 60)]
    driver.generate(jobs, chunk=23, stagger=2)
    assert sum(assert_greedy(reference, job.prompt, job.output) for job in jobs) <= 1
    driver.executor.close()


def test_native_and_library_agree(tmp_path: Path) -> None:
    directory = make_model("qwen3-moe", tmp_path)
    (ids,) = random_prompts(1, LENGTH, LENGTH)
    want = reference_logits(load_reference(directory), ids)
    check_all_ways(Runner(directory, "transformers"), want, ids, LOGIT_BOUND, single=False)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Qwen2MoeForCausalLM"])
def test_16_bit_is_near_the_reference(architecture: str, tmp_path: Path) -> None:
    directory = make_library_model(architecture, tmp_path, "bfloat16")
    driver = PlanDriver(directory)
    assert driver.ready.dtype == "bfloat16"
    exact = load_reference(directory)
    library = load_reference(directory, torch.bfloat16)
    prompts = random_prompts(6, 10, 40)
    jobs = [driver.job(prompt) for prompt in prompts]
    driver.generate(jobs)
    for prompt, job in zip(prompts, jobs, strict=True):
        want = reference_logits(exact, prompt)[-1]
        strayed = (reference_logits(library, prompt)[-1] - want).abs().max()
        assert want.max() - want[job.output[0]] <= 2 * strayed


def test_progress_moves_with_each_layer(tmp_path: Path) -> None:
    driver = PlanDriver(make_library_model("GPT2LMHeadModel", tmp_path))
    before = driver.executor.counter
    driver.step([driver.job(range(3, 20), 1)])
    # One a layer, two of its attention, one of the head at least.
    assert driver.executor.counter - before >= 3 * 3 + 1


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    """What needs no conversion is used where the file is mapped."""
    runner = Runner(make_library_model("GPT2LMHeadModel", tmp_path))
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    for weight in runner.loaded.model._model.parameters():
        assert any(first <= weight.data_ptr() < last for first, last in mapped)


def test_context_ends_where_frequencies_would_change(tmp_path: Path) -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    directory = make_library_model(
        "Phi3ForCausalLM",
        tmp_path,
        rope_parameters={"rope_theta": 10000.0, "original_max_position_embeddings": 128, **long},
        original_max_position_embeddings=128,
    )
    assert PlanDriver(directory).ready.max_model_len == 128


REFUSED = {
    "NoSuchForCausalLM": ({}, "no such decoder"),
    "BloomForCausalLM": ({}, "takes no attention but its own"),
    "MambaForCausalLM": ({}, "takes no attention but its own"),
    "T5ForConditionalGeneration": ({}, "no such decoder"),
    "BartForCausalLM": ({}, "is not supported"),
    "LlavaForConditionalGeneration": ({}, "no such decoder"),
    "Gemma3ForConditionalGeneration": ({}, "takes more than text"),
    "Gemma3TextModel": ({}, "no such decoder"),
    "Lfm2ForCausalLM": ({**_BASE, "layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "Gemma3ForCausalLM": ({**_BASE, "use_bidirectional_attention": True}, "what comes after"),
    "Llama4ForCausalLM": ({}, "chunked_attention"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_by_name_before_weights_are_read(architecture: str, tmp_path: Path) -> None:
    values, reason = REFUSED[architecture]
    make_model("qwen3", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **values}))
    with pytest.raises(ConfigError, match=reason) as caught:
        Runner(tmp_path)
    assert architecture in caught.value.message


@pytest.mark.parametrize(
    ("architecture", "more", "reason"),
    [
        ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, "sinks"),
        ("BertLMHeadModel", {"is_decoder": False}, "not supported"),
    ],
)
def test_refused_by_its_probe(architecture: str, more: dict, reason: str, tmp_path: Path) -> None:
    library = {**_BASE, "partial_rotary_factor": 1.0, "head_dim": 16, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIBRARY_MODELS, architecture, library)
        directory = make_library_model(architecture, tmp_path)
    with pytest.raises(ConfigError, match=reason) as caught:
        Runner(directory)
    assert architecture in caught.value.message


def test_state_that_the_seam_does_not_see_is_refused(tmp_path: Path, monkeypatch) -> None:
    """A class that says that it fits and does not: found by comparing both ways."""
    from transformers.models.phi import modeling_phi

    directory = make_library_model("PhiForCausalLM", tmp_path)
    forward = modeling_phi.PhiMLP.forward
    monkeypatch.setattr(
        modeling_phi.PhiMLP, "forward", lambda self, x: forward(self, x).cumsum(dim=1)
    )
    with pytest.raises(ConfigError, match=r"PhiForCausalLM.*other numbers"):
        Runner(directory)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    directory = make_library_model("PhiForCausalLM", tmp_path)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.3\."):
        Runner(directory)
