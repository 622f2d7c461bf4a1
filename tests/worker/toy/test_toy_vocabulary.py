"""What the toy engine may draw, and what it says of itself."""

from __future__ import annotations

import json

import pytest

from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import DependencyError
from xllm.worker.factory import make_executor
from xllm.worker.toy.executor import ToyExecutor
from xllm.worker.toy.vocabulary import toy_vocabulary, widest_gap


def write_tokenizer(directory, vocab, special) -> str:
    added = [{"id": token, "content": f"<{token}>", "special": True} for token in special]
    body = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab}}
    (directory / "tokenizer.json").write_text(json.dumps(body))
    return str(directory)


@pytest.mark.parametrize(
    ("special", "size", "ids"),
    [
        ([], 10, range(10)),
        ([0, 1], 10, range(2, 10)),
        ([8, 9], 10, range(8)),
        ([0, 4], 10, range(5, 10)),
        ([0, 1, 2], 3, range(0)),
    ],
)
def test_widest_gap(special, size, ids) -> None:
    assert widest_gap(special, size) == ids


def test_special_tokens_are_left_out(tmp_path) -> None:
    vocab = {chr(65 + k): k for k in range(20)}
    path = write_tokenizer(tmp_path, vocab, [0, 1, 20, 21])
    assert toy_vocabulary(path) == (22, range(2, 20))


def test_unigram_vocabularies_are_lists(tmp_path) -> None:
    path = write_tokenizer(tmp_path, [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], [0])
    assert toy_vocabulary(path) == (3, range(1, 3))


def test_without_a_tokenizer() -> None:
    assert toy_vocabulary("") == (1000, range(16, 1000))
    assert toy_vocabulary("/nowhere") == (1000, range(16, 1000))


@pytest.mark.parametrize("content", ["", "[]", '{"model": 3}', '{"model": {}}'])
def test_a_broken_tokenizer_is_refused(tmp_path, content) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DependencyError, match=r"tokenizer\.json"):
        toy_vocabulary(str(tmp_path))


def test_the_settings_make_the_engine(tmp_path) -> None:
    path = write_tokenizer(tmp_path, {chr(65 + k): k for k in range(20)}, [0])
    worker = WorkerSettings(engine="toy", block_size=4, toy_num_blocks=50, rank=0)
    model = ModelSettings(path=path, max_model_len=77)
    executor = make_executor(Settings(model=model, worker=worker))
    assert isinstance(executor, ToyExecutor)
    seen: list[tuple[int, int]] = []
    ready = executor.load(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    assert (ready.num_blocks, ready.block_size, ready.max_model_len) == (50, 4, 77)
    assert (ready.model, ready.vocab_size, ready.eos_ids) == (tmp_path.name, 20, ())
    assert len(ready.revision) == 64
    again = make_executor(Settings(model=model, worker=worker)).load(lambda done, total: None)
    assert again == ready
