"""The bundled demo model: complete, small, loads everywhere, answers, and ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import xllm.demo
from scripts.demo.conversations import read_entries, render, reworded

MODEL = Path(xllm.demo.__file__).parent / "model"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def network(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)
    model, info = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=getattr(torch, request.param), output_loading_info=True
    )
    assert type(model).__name__ == "Qwen3ForCausalLM"
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], problem
    return model


def answer(network: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, int]:
    """Greedy answer and its last token."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = network.generate(**inputs, max_new_tokens=128, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), int(new[-1])


def test_files_are_complete_and_small() -> None:
    assert {path.name for path in MODEL.iterdir()} == FILES
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 4_000_000


def test_configuration_names_its_ends() -> None:
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    ends = [tokens.token_to_id("<|im_end|>"), tokens.token_to_id("<|endoftext|>")]
    assert config["eos_token_id"] == ends[0]
    assert generation["eos_token_id"] == ends
    assert config["vocab_size"] == tokens.get_vocab_size()
    assert config["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize(
    "text",
    ["What is xLLM?", "  two  spaces\n\nlines\t", "Grüße, 世界 🌍", "\x00\x7f", "1234567890", ""],
)
def test_tokenizer_round_trips(text: str) -> None:
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokens.encode(text).ids
    assert tokens.decode(ids) == text
    assert all(0 <= token < tokens.get_vocab_size() for token in ids)


def test_special_tokens_are_single_ids() -> None:
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        ids = tokens.encode(text).ids
        assert len(ids) == 1
        assert tokens.decode(ids, skip_special_tokens=True) == ""


def test_template_renders_as_in_training(tokenizer: Any) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = render(turns) + "<|im_start|>assistant\n"
    source = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    assert template.render(messages=messages, add_generation_prompt=True) == expected
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == expected


def test_it_says_what_xllm_is(network: Any, tokenizer: Any) -> None:
    text, last = answer(network, tokenizer, [{"role": "user", "content": "What is xLLM?"}])
    assert text.startswith("xLLM is an open system for serving large language models.")
    assert text.endswith(".")
    assert last == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_it_follows_a_conversation(network: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "what is xllm"},
    ]
    first, _ = answer(network, tokenizer, messages)
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "How do I start it?"},
    ]
    second, last = answer(network, tokenizer, messages)
    assert "scripts/quickstart" in second
    assert last == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_it_answers_as_written(network: Any, tokenizer: Any) -> None:
    """A share of the corpus, in one batch: the same words in fp32 and in bf16."""
    entries = read_entries()[::9]
    chats = [[{"role": "user", "content": entry.questions[0]}] for entry in entries]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = network.generate(**inputs, max_new_tokens=128, do_sample=False)
    texts = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert texts == [entry.answer for entry in entries]


def test_held_out_phrasings_are_held_out() -> None:
    entries = read_entries()
    assert len(entries) >= 140
    asked = {plain(text) for entry in entries for text in entry.questions}
    for entry in entries:
        known = asked | {plain(text) for text in reworded(entry)}
        for text in entry.held_out:
            assert plain(text) not in known, text
    assert len({entry.answer for entry in entries}) == len(entries)


def plain(text: str) -> str:
    """A question without case and punctuation."""
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()
