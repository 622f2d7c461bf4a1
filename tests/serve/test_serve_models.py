"""Two models from one `xllm serve`: each request gets the one that it names."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import httpx
import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, wait_until
from xllm import Client
from xllm.errors import ModelNotFoundError, UnavailableError

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    first, second = (make_toy_model(base / name) for name in ("one", "two"))
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xm').name}"
    with Served(first, run_dir, "--more-models", f"2nd={second}") as served:
        yield served
    assert not pathlib.Path(run_dir).exists() or not any(pathlib.Path(run_dir).iterdir())


@pytest.mark.parametrize("name", ["one", "2nd"])
def test_each_model_answers(served, name, tmp_path):
    ids = (10, 11, 12, 13, 14)
    with Client(served.zmq) as client:
        answer = client.generate(
            ids, model=name, max_tokens=12, temperature=0.0, ignore_eos=True, seed=1
        )
        [choice] = answer.choices
        path = make_toy_model(tmp_path / name)
        want = expected_ids(path, ids, 12, temperature=0.0, seed=1)
        assert tuple(choice.token_ids) == want
        assert client.detokenize(want, model=name)


def test_both_are_listed_and_one_must_be_named(served):
    models = httpx.get(f"{served.http}/models").json()["data"]
    assert [(one["id"], one["ready"]) for one in models] == [("one", True), ("2nd", True)]
    assert served.text.count("one, 2nd") >= 1
    body = {"prompt": "hello", "max_tokens": 2}
    url = f"{served.http}/completions"
    assert httpx.post(url, json={**body, "model": "2nd"}).status_code == 200
    refused = httpx.post(url, json={**body, "model": "third"})
    assert refused.status_code == 404
    assert "'one', '2nd'" in refused.json()["error"]["message"]
    with Client(served.zmq) as client, pytest.raises(ModelNotFoundError, match="name a model"):
        client.generate("hello", max_tokens=2)


def test_a_model_sleeps_and_wakes_by_command(served):
    def command(*words: str) -> str:
        line = [sys.executable, "-m", "xllm", *words, "--endpoint", served.zmq]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    assert command("sleep", "2nd", "--drop-weights") == "2nd is asleep\n"
    with Client(served.zmq) as client:
        wait_until(lambda: not client.models()[1].ready, what="sleep")
        with pytest.raises(UnavailableError, match="'2nd' is asleep"):
            client.generate("hello", model="2nd", max_tokens=2)
        assert client.generate("hello", model="one", max_tokens=2)
        assert client.health(probe=True).ready
        instances = [one for one in client.status() if one.kind == "instance"]
        states = [one.state for one in instances if one.model == "2nd"]
        assert states == ["asleep"]
        with pytest.raises(ModelNotFoundError):
            client.sleep("third")
    assert command("wake", "2nd") == "2nd is awake\n"
    with Client(served.zmq) as client:
        wait_until(lambda: client.models()[1].ready, what="wake")
        assert client.generate("hello", model="2nd", max_tokens=2)
