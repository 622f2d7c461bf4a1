"""A model directory that the toy engine and the router can serve, and what its streams are."""

from __future__ import annotations

from pathlib import Path

from tests.router.model_dirs import byte_level_tokenizer, write_model
from xllm.protocol.sampling import SamplingParams
from xllm.worker.toy.stream import predict
from xllm.worker.toy.vocabulary import toy_vocabulary


def make_toy_model(directory: Path) -> str:
    """Writes it; returns its path."""
    write_model(directory, byte_level_tokenizer())
    (directory / "config.json").write_text('{"architectures": ["Toy"]}')
    return str(directory)


def expected_ids(
    path: str, prompt_ids: tuple[int, ...], count: int, *, choice: int = 0, **sampling: object
) -> tuple[int, ...]:
    """The tokens that the toy engine gives."""
    _, ids = toy_vocabulary(path)
    return tuple(predict(prompt_ids, SamplingParams(**sampling), choice, count, ids))
