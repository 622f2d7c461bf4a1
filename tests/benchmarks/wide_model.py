"""A model directory for the toy engine whose vocabulary holds every id of the workloads."""

from __future__ import annotations

import json
from pathlib import Path

from tests.router.model_dirs import CHAT_TEMPLATE

VOCAB_SIZE = 32_100


def make_wide_model(directory: Path) -> str:
    """Writes it; returns its path."""
    directory.mkdir(parents=True)
    words = {f"w{index}": index for index in range(VOCAB_SIZE - 1)}
    end = {"id": VOCAB_SIZE - 1, "content": "<|end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text('{"architectures": ["Toy"]}')
    return str(directory)
