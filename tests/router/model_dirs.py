"""Small model directories for the router's tests: tokenizers of each kind, with templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and not enable_thinking %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{% endif %}\n"
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "hello world, héllo wörld", "stop here now"]
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE like Qwen's, with 256 bytes, a few merges and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens(["<tool call>"])
    return tokenizer


def byte_fallback_tokenizer(metaspace: bool = False) -> Tokenizer:
    """A SentencePiece-like BPE as Llama 2 and Mistral have it."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!", "é", "▁he", "llo", "▁wo", "rld", "▁▁"]
    merges = [("▁", "▁")]
    vocab = {name: rank for rank, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    if metaspace:
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_model(
    directory: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None
) -> Path:
    """A model directory as the router reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    default = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    text = json.dumps(default if config is None else config)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory
