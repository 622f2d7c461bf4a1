"""`xllm serve` with the toy engine, end to end: real processes, both endpoints, the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, wait_until
from xllm import Client
from xllm.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from xllm.router.text.model import load_text_model

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('xs').name}", "--instances", "2") as served:
        yield served
    assert served.process.returncode == 0
    assert not served.run_dir.exists() or list(served.run_dir.iterdir()) == []
    if served.run_dir.exists():
        served.run_dir.rmdir()


@pytest.fixture
def client(served):
    with Client(served.zmq, timeout_s=30) as client:
        yield client


def xllm(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xllm", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_lines_of_the_start(served):
    for kind in ("router", "master", "worker", "kvcache"):
        assert served.num_ready(kind) >= 1
    (router,) = [line for line in served.lines if "router-0: listens (pid" in line]
    assert re.search(r"\), serves \S+ while an instance of the model is ready$", router)
    first = next(line for line in served.lines if " ready (" in line or line.startswith("ready"))
    assert first.startswith("master")
    assert "curl http://127.0.0.1:" in served.text
    assert served.errors == []


def test_tokens_are_the_engines(client, model):
    prompt = (70, 71, 72)
    done = client.generate(prompt, max_tokens=50, seed=4)
    assert done.token_ids == expected_ids(model, prompt, 50, seed=4)
    assert done.text == load_text_model(model).decode(done.token_ids)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 50)
    assert done.finish_reason == "length"


def test_a_stream_is_the_same(client, model):
    stream = client.stream((70, 71, 72), max_tokens=50, seed=4, hold_ms=0)
    deltas = list(stream)
    ids = tuple(i for delta in deltas for i in delta.token_ids)
    assert ids == expected_ids(model, (70, 71, 72), 50, seed=4)
    assert len(deltas) > 10
    assert stream.completion.text == "".join(delta.text for delta in deltas)


def test_choices_differ(client, model):
    done = client.generate((70, 71), max_tokens=8, n=3, seed=5)
    for choice in done.choices:
        expected = expected_ids(model, (70, 71), 8, choice=choice.index, seed=5)
        assert choice.token_ids == expected


def kinds_of_all(client):
    """The kinds of all processes once both workers, known from heartbeats, are among them."""
    kinds = [process.kind for process in client.status()]
    return kinds if kinds.count("instance") == kinds.count("worker") == 2 else None


def test_questions(client):
    assert [m.name for m in client.models()] == ["toy-model"]
    assert client.health(probe=True).ready
    kinds = wait_until(lambda: kinds_of_all(client), what="the heartbeat of each instance")
    assert "router" in kinds
    ids = client.tokenize("hello world")
    assert client.detokenize(ids) == "hello world"


def test_refusals(client):
    with pytest.raises(ModelNotFoundError):
        client.generate("a", model="other")
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(ContextLengthError):
        client.generate("a", max_tokens=10_000_000)


def test_the_printed_curl(served):
    body = {"model": "toy-model", "messages": [{"role": "user", "content": "hello"}]}
    body["max_tokens"] = 5
    request = urllib.request.Request(
        f"{served.http}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        answer = json.load(response)
    assert answer["usage"]["completion_tokens"] == 5


def test_status_command(served):
    done = xllm("status", "--endpoint", served.zmq)
    assert done.returncode == 0, done.stderr
    assert "instance-0" in done.stdout
    assert "instance-1" in done.stdout
    listed = json.loads(xllm("status", "--endpoint", served.zmq, "--json").stdout)
    assert {"instance-0", "instance-1"} <= {process["name"] for process in listed}


def test_chat_command(served):
    flags = ["--endpoint", served.zmq, "--max-tokens", "6", "--seed", "1"]
    one = xllm("chat", *flags, "--message", "hello")
    assert one.returncode == 0, one.stderr
    assert "6 new tokens; TTFT" in one.stderr
    talk = xllm("chat", *flags, text="hello\n/reset\nhello\n/help\n/exit\n")
    assert talk.returncode == 0, talk.stderr
    answers = talk.stdout.replace("> ", "").splitlines()
    assert answers == [one.stdout.strip("\n")] * 2
