"""`xllm run` with the toy engine: the tokens are those of the oracle."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from xllm.cli.main import run_command
from xllm.cli.offline import OfflineEngine
from xllm.client.requests import build_submit
from xllm.config.load import load
from xllm.errors import ContextLengthError, InvalidRequestError
from xllm.protocol.generation import ChatMessage, RequestFinished
from xllm.router.text.model import load_text_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "m")


@pytest.fixture
def engine(model):
    flags = {"model.path": model, "model.name": "m", "worker.engine": "toy"}
    flags |= {"worker.toy_num_blocks": 8, "model.max_model_len": 100}
    engine = OfflineEngine(load(flags, None, {}), lambda done, total: None)
    yield engine
    engine.close()


def ask(engine, prompt, **options):
    request = build_submit(1, {"hold_ms": 0, **options}, timeout_s=20, stream=True, prompt=prompt)
    *deltas, end = engine.answer(request)
    assert isinstance(end, RequestFinished)
    return deltas, end


def test_the_oracles_tokens(engine, model):
    prompt = (5, 6, 7)
    deltas, end = ask(engine, prompt, max_tokens=40, seed=9)
    ids = tuple(i for delta in deltas for i in delta.token_ids)
    assert ids == expected_ids(model, prompt, 40, seed=9)
    assert end.choices[0].finish_reason == "length"
    assert end.usage.completion_tokens == 40
    assert "".join(delta.text for delta in deltas) == load_text_model(model).decode(ids)


def test_choices_and_a_seed_of_its_own(engine, model):
    deltas, end = ask(engine, (5, 6, 7), max_tokens=5, n=3)
    for choice in range(3):
        ids = tuple(i for d in deltas if d.choice == choice for i in d.token_ids)
        assert ids == expected_ids(model, (5, 6, 7), 5, choice=choice, seed=end.seed)


def test_refusals(engine):
    with pytest.raises(ContextLengthError):
        ask(engine, tuple(range(1, 120)), max_tokens=5)
    with pytest.raises(InvalidRequestError):
        ask(engine, (5,), temperature=9)
    assert ask(engine, (5,), max_tokens=1)[1].usage.completion_tokens == 1


def test_leaving_early_frees_the_engine(engine):
    for _ in range(5):
        request = build_submit(1, {"max_tokens": 90}, timeout_s=20, stream=True, prompt=(5, 6))
        answer = engine.answer(request)
        next(answer)
        answer.close()
    assert ask(engine, (5,), max_tokens=90)[1].usage.completion_tokens == 90


def test_text_and_figures(model, capsys):
    arguments = ["run", "hello", "--model", model, "--engine", "toy", "--max-tokens", "7"]
    assert run_command([*arguments, "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert "7 new tokens; TTFT" in shown.err
    text = shown.out
    assert run_command([*arguments, "--seed", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choices"][0]["text"] == text.removesuffix("\n")
    assert found["usage"]["completion_tokens"] == 7
    text_model = load_text_model(model)
    prompt = text_model.encode(
        text_model.render((ChatMessage(role="user", content="hello"),), {}), False
    )
    expected = expected_ids(model, tuple(prompt), 7, seed=3)
    assert tuple(found["choices"][0]["token_ids"]) == expected


def test_stop_string_and_raw_prompt(model, capsys):
    arguments = ["run", "hello", "--raw", "--model", model, "--engine", "toy", "--seed", "3"]
    assert run_command([*arguments, "--max-tokens", "30", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["choices"][0]["text"]
    stop = whole[8:10]
    assert run_command([*arguments, "--max-tokens", "30", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole.split(stop)[0] + "\n"


def test_a_wrong_option_is_one_line(model, capsys):
    arguments = ["run", "hello", "--model", model, "--engine", "toy", "--temperature", "-1"]
    assert run_command(arguments) == 64
    assert "temperature" in capsys.readouterr().err


def test_a_wrong_option_is_said_before_the_model_is_read(capsys):
    assert run_command(["run", "hello", "--model", "/nowhere", "--max-tokens", "-3"]) == 64
    assert "max_tokens must be at least 1, not -3" in capsys.readouterr().err


def test_assertions_decide_nothing():
    """`python -O` leaves them out: the answer of the demo model is the same without."""

    def answer(*flags):
        command = [sys.executable, *flags, "-m", "xllm", "run", "What is xLLM?", "--json"]
        command += ["--max-tokens", "24", "--temperature", "0.8", "--seed", "5"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout)

    with_them, without = answer(), answer("-O")
    assert with_them["choices"] == without["choices"]
    assert len(without["choices"][0]["token_ids"]) == 24
