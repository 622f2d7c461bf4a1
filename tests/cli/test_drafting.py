"""Guessed tokens, from a request to its text: with them everything is as without."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.toy_model import make_toy_model
from xllm.cli.model_source import demo_model_path
from xllm.cli.offline import OfflineEngine
from xllm.client.requests import build_submit
from xllm.config.load import load
from xllm.protocol.generation import RequestFinished

TEXT = "one two three four five six seven, " * 6
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "long": {"temperature": 0.0, "ignore_eos": True, "max_tokens": 150},
    "sampled": {"temperature": 0.4, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "choices": {"temperature": 0.7, "n": 2},
    "short": {"temperature": 0.0, "max_tokens": 6},
    "least": {"temperature": 0.0, "min_tokens": 40},
}


@pytest.fixture(scope="module", params=["demo", "toy"])
def engines(request, tmp_path_factory):
    """One that guesses and one that does not."""
    flags: dict[str, Any] = {"model.name": "m", "model.max_model_len": 400}
    if request.param == "toy":
        flags["model.path"] = make_toy_model(tmp_path_factory.mktemp("toy") / "m")
        flags["worker.engine"] = "toy"
    else:
        flags |= {"model.path": demo_model_path(), "model.dtype": "float32"}
        flags |= {"worker.device": "cpu", "worker.num_threads": 1}
        flags |= {"worker.kv_cache_bytes": 16 << 20}
    found = [
        OfflineEngine(load(flags | {"scheduler.drafting": drafting}, None, {}), lambda *seen: None)
        for drafting in ("prompt-lookup", "none")
    ]
    yield request.param, *found
    for engine in found:
        engine.close()


def answer(engine: OfflineEngine, **options: Any) -> tuple[list[Any], RequestFinished]:
    """What each choice said, and the end."""
    more = {"hold_ms": 0, "max_tokens": 60, "seed": 3, **options}
    request = build_submit(1, more, timeout_s=60, stream=True, prompt=TEXT)
    *deltas, end = engine.answer(request)
    assert isinstance(end, RequestFinished)
    said = []
    for choice in range(options.get("n", 1)):
        own = [delta for delta in deltas if delta.choice == choice]
        ids = [token for delta in own for token in delta.token_ids]
        text = "".join(delta.text for delta in own)
        scores = [row for delta in own for row in delta.logprobs or ()]
        assert not scores or [row.token_id for row in scores] == ids
        said.append((ids, text, [row.logprob for row in scores], len(own)))
    return said, end


def num_accepted(engine: OfflineEngine) -> int:
    return engine._scheduler.statistics().num_accepted_drafts


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_the_same(engines, name):
    kind, drafting, plain = engines
    before = num_accepted(drafting)
    (found, end), (want, other) = (answer(one, **ASKED[name]) for one in (drafting, plain))
    for one, two in zip(found, want, strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], abs=1e-4)
    assert [c.finish_reason for c in end.choices] == [c.finish_reason for c in other.choices]
    assert end.usage == other.usage
    assert num_accepted(plain) == 0
    if kind == "demo" and name == "long":
        # It repeats itself. Several tokens of a step are one delta.
        assert num_accepted(drafting) > before
        assert found[0][3] < want[0][3]


def test_a_stop_string_ends_a_text_where_it_ends_without(engines):
    _, drafting, plain = engines
    whole = answer(plain, temperature=0.0, ignore_eos=True)[0][0][1]
    assert len(whole) > 12
    for begin in range(1, 10, 3):
        stop = whole[begin : begin + 2]
        found, end = answer(drafting, temperature=0.0, ignore_eos=True, stop=[stop])
        want, other = answer(plain, temperature=0.0, ignore_eos=True, stop=[stop])
        assert found[0][1] == want[0][1] == whole.split(stop)[0]
        assert end.usage == other.usage
        assert [c.finish_reason for c in end.choices] == ["stop"]
