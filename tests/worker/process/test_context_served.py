"""A service with little KV memory: its context is what the memory holds, and a chat that names no
limit runs to its end."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served

HELD = 100 * 16
"""Tokens in the blocks of the service: the toy's own context is longer."""


@pytest.mark.process
def test_a_chat_without_max_tokens_fits_the_memory(tmp_path) -> None:
    model = make_toy_model(tmp_path / "toy-model")
    body = {"model": "toy-model", "messages": [{"role": "user", "content": "hello"}]}
    with Served(model, f"/tmp/{tmp_path.name}", "--worker-toy-num-blocks", "100") as served:
        request = urllib.request.Request(
            f"{served.http}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            usage = json.load(answer)["usage"]
        with urllib.request.urlopen(f"{served.http}/models", timeout=60) as answer:
            (listed,) = json.load(answer)["data"]
    if served.run_dir.exists():
        served.run_dir.rmdir()
    assert usage["total_tokens"] == listed["max_model_len"] == HELD
    (warning,) = [line for line in served.errors if "context_cut_to_kv_memory" in line]
    assert "8192" in warning
    assert str(HELD) in warning
