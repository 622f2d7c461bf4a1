"""Loading a model directory: special tokens, templates, and the same text as transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.router.model_dirs import (
    CHAT_TEMPLATE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_model,
)
from xllm.errors import DependencyError, InvalidRequestError
from xllm.protocol.generation import ChatMessage, ContentPart
from xllm.router.text.model import load_text_model

TALK = (
    ChatMessage(role="system", content="be <b>brief</b>"),
    ChatMessage(role="user", content="hello wörld"),
    ChatMessage(role="assistant", content="hi"),
    ChatMessage(role="user", content="stop here now"),
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 3 %}{% break %}{% endif %}"
    "{% generation %}[{{ m['role'] | upper }}] {{ m['content'] | trim | tojson }}"
    "{% endgeneration %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('who is ' + m.role) }}{% endif %}{% endfor %}\n"
    "    {% if messages | length > 2 %}\nlong\n    {% endif %}\n"
    "{% set ns = namespace(found=false) %}{% set ns.found = true %}{{ ns.found }}{{ eos_token }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "kwargs", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}]
)
def test_renders_what_transformers_renders(tmp_path, template, count, kwargs):
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": "<|im_start|>", "eos_token": "<|end|>", "chat_template": template}
    write_model(tmp_path, byte_level_tokenizer(), config)
    model = load_text_model(str(tmp_path))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    messages = [{"role": m.role, "content": m.content} for m in TALK[:count]]
    expected = reference.apply_chat_template(
        messages, tokenize=False, **{"add_generation_prompt": True, **kwargs}
    )
    assert model.render(TALK[:count], kwargs) == expected
    ids = reference.apply_chat_template(
        messages, return_dict=False, **{"add_generation_prompt": True, **kwargs}
    )
    assert model.encode(model.render(TALK[:count], kwargs), add_special_tokens=False) == ids


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_adds_the_special_tokens_that_transformers_adds(tmp_path, flags):
    from transformers import PreTrainedTokenizerFast

    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **flags}
    write_model(tmp_path, byte_fallback_tokenizer(), config)
    config["bos_token"] = "<s>"
    model = load_text_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert model.encode("hello") == reference.encode("hello")
    assert model.encode("hello", add_special_tokens=False) == reference.encode(
        "hello", add_special_tokens=False
    )


def test_content_parts_are_joined(tmp_path):
    model = load_text_model(str(write_model(tmp_path, byte_level_tokenizer())))
    parts = (ContentPart(type="text", text="hello "), ContentPart(type="text", text="world"))
    talk = (ChatMessage(role="user", content=parts),)
    assert "hello world" in model.render(talk, {})


def test_a_model_without_template_cannot_chat(tmp_path):
    model = load_text_model(str(write_model(tmp_path, byte_level_tokenizer(), {})))
    assert not model.has_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        model.render(TALK, {})


def test_template_sources_in_order(tmp_path):
    write_model(
        tmp_path,
        byte_level_tokenizer(),
        {
            "chat_template": [
                {"name": "tool_use", "template": "T"},
                {"name": "default", "template": "D"},
            ]
        },
    )
    assert load_text_model(str(tmp_path)).render(TALK, {}) == "D"
    (tmp_path / "chat_template.jinja").write_text("J{# from its own file #}")
    assert load_text_model(str(tmp_path)).render(TALK, {}) == "J"


def test_what_a_template_raises_is_the_requests_fault(tmp_path):
    write_model(tmp_path, byte_level_tokenizer(), {"chat_template": LLAMA})
    model = load_text_model(str(tmp_path))
    with pytest.raises(InvalidRequestError, match="who is robot") as caught:
        model.render((ChatMessage(role="robot", content="x"),), {})
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ messages[0].content | nosuch }}",
        "{{ 1 / 0 }}",
        "{{ range(1000000) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_run_in_the_sandbox(tmp_path, template):
    write_model(tmp_path, byte_level_tokenizer(), {"chat_template": template})
    with pytest.raises((InvalidRequestError, DependencyError)):
        load_text_model(str(tmp_path)).render(TALK, {})


def test_broken_directories_are_refused(tmp_path):
    with pytest.raises(DependencyError, match="no tokenizer"):
        load_text_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DependencyError):
        load_text_model(str(tmp_path))
    write_model(tmp_path, byte_level_tokenizer(), {"chat_template": "{% if %}"})
    with pytest.raises(DependencyError, match="template"):
        load_text_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", b"{"),
        ("chat_template.json", b"[1]"),
        ("chat_template.json", b"[" * 100_000),
        ("chat_template.json", b"\xff"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("special_tokens_map.json", b"{"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    write_model(tmp_path, byte_level_tokenizer(), {"eos_token": "<|end|>"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DependencyError, match=name):
        load_text_model(str(tmp_path))


@pytest.mark.parametrize("named", [[1], [{"template": "x"}], [{"name": []}], {"other": "x"}, 3])
def test_odd_lists_of_templates_are_none(tmp_path, named):
    write_model(tmp_path, byte_level_tokenizer(), {"chat_template": named})
    assert not load_text_model(str(tmp_path)).has_template


def test_token_bytes_and_specials(tmp_path):
    model = load_text_model(str(write_model(tmp_path, byte_level_tokenizer())))
    [end] = model.encode("<|end|>")
    assert model.token_bytes(end) == b"<|end|>"
    assert model.decode([end, *model.encode("hi")]) == "hi"
    assert model.decode([end], skip_special_tokens=False) == "<|end|>"
    assert b"".join(map(model.token_bytes, model.encode("wörld <tool call>"))) == (
        "wörld <tool call>".encode()
    )
    assert model.token_bytes(10**6) == b""
    assert model.longest_token_bytes == len("<|im_start|>")


def test_text_needs_neither_torch_nor_transformers(tmp_path):
    write_model(tmp_path, byte_level_tokenizer())
    code = (
        "import sys; from xllm.router.text.model import load_text_model;"
        "from xllm.protocol.generation import ChatMessage;"
        f"m = load_text_model({str(tmp_path)!r});"
        "t = m.render((ChatMessage(role='user', content='hi'),), {}); assert m.encode(t, False);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
