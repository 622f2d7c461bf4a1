"""Vectors from `xllm serve`: the official `openai` client, our own, and an instance that dies."""

from __future__ import annotations

import base64
import contextlib
import os
import pathlib
import re
import signal
import threading
from array import array

import httpx
import openai
import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served, wait_until
from xllm import Client
from xllm.errors import ContextLengthError, InvalidRequestError
from xllm.router.text.model import load_text_model
from xllm.worker.toy.vectors import WIDTH, predict_vector

pytestmark = pytest.mark.process

MODEL = "toy-embed"
TEXTS = ["the quick brown fox", "hello wörld", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)


@contextlib.contextmanager
def serve(model, tmp_path_factory, *flags):
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xe').name}"
    with Served(model, run_dir, "--model-task", "embed", *flags) as served:
        yield served
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    flags = ("--model-pooling", "mean", "--scheduler-max-num-batched-tokens", "16")
    with serve(model, tmp_path_factory, *flags) as served:
        yield served


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.http, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def vectors(model, texts, pooling="mean"):
    text_model = load_text_model(model)
    return [
        list(array("f", predict_vector(text_model.encode(text), pooling, 16))) for text in texts
    ]


def test_the_official_client_gets_the_vectors(client, model):
    for options in ({}, {"encoding_format": "float"}):
        done = client.embeddings.create(model=MODEL, input=TEXTS, user="someone", **options)
        assert [list(one.embedding) for one in done.data] == vectors(model, TEXTS)
        assert [one.index for one in done.data] == [0, 1, 2]
        ids = [load_text_model(model).encode(text) for text in TEXTS]
        assert done.usage.prompt_tokens == done.usage.total_tokens == sum(map(len, ids))
    raw = client.embeddings.create(model=MODEL, input=ids, encoding_format="base64")
    got = [list(array("f", base64.b64decode(one.embedding))) for one in raw.data]
    assert got == vectors(model, TEXTS)
    short = client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=4)
    assert len(short.data[0].embedding) == 4


def test_the_launcher_shows_how_to_ask(served):
    assert f"curl {served.http}/embeddings" in served.text
    assert "chat/completions" not in served.text


def test_bad_requests_get_their_reason(client, served):
    for body in ({"dimensions": WIDTH + 1}, {"dimensions": 0}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=MODEL, input="a", **body)
        assert caught.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="served for task embed") as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="served for task embed"):
        client.completions.create(model=MODEL, prompt="hi")
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model=MODEL, input=[[5], [5] * 9000])
    assert (long.value.param, long.value.code) == ("input[1]", "context_length_exceeded")
    assert client.models.retrieve(MODEL).model_extra["task"] == "embed"


def test_our_own_client_gets_them_too(served, model):
    with Client(served.zmq) as client:
        got = client.embed(TEXTS)
        assert [list(vector) for vector in got.vectors] == vectors(model, TEXTS)
        with pytest.raises(ContextLengthError) as caught:
            client.embed([[5], [5] * 9000])
        assert caught.value.param == "inputs[1]"
        with pytest.raises(InvalidRequestError, match="served for task embed"):
            client.generate("hello")
        assert client.models()[0].embedding_size == WIDTH


def test_the_metrics_count_vectors(served):
    with Client(served.zmq) as client:
        client.embed(TEXTS)

    def counted() -> bool:
        text = httpx.get(served.http.removesuffix("/v1") + "/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("xllm_master_vectors")]
        return any(float(line.rpartition(" ")[2]) >= len(TEXTS) for line in lines)

    wait_until(counted, what="the count of vectors")


def test_vectors_survive_an_instances_death(model, tmp_path_factory):
    flags = ("--serve-instances", "2", "--worker-toy-step-ms", "50", "--model-pooling", "last")
    flags += ("--scheduler-max-num-seqs", "2")
    texts = [f"{text} {number}" for number in range(40) for text in TEXTS]
    with serve(model, tmp_path_factory, *flags) as served, Client(served.zmq) as client:

        def instances():
            return [one for one in client.status() if one.kind == "instance"]

        wait_until(lambda: [one.state for one in instances()] == ["ready"] * 2, what="two")
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.embed(texts)))
        thread.start()
        busy = wait_until(lambda: [one.name for one in instances() if one.num_running], what="load")
        (pid,) = re.findall(rf"{busy[0]}: ready \(pid (\d+)\)", served.text)
        os.kill(int(pid), signal.SIGKILL)
        thread.join(30)
        got = answers[0]
        assert [list(vector) for vector in got.vectors] == vectors(model, texts, "last")
        moves = httpx.get(served.http.removesuffix("/v1") + "/metrics").text
        (line,) = [one for one in moves.splitlines() if one.startswith("xllm_router_moves_total")]
        assert float(line.rpartition(" ")[2]) > 0
