"""`xllm bench serve` against a fake server, and against xLLM with the toy engine."""

from __future__ import annotations

import json
import socket
import tempfile

import pytest

from tests.cli.bench.fake_openai import FakeOpenAi
from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served
from xllm.cli.main import run_command


def bench(*arguments):
    return run_command(["bench", "serve", *map(str, arguments)])


def test_a_fake_server(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-word")
    path, plot = tmp_path / "o.json", tmp_path / "o.svg"
    with FakeOpenAi() as server:
        code = bench(
            *("--base-url", server.url, "--num-requests", 12, "--output-len", 9, "--spread", 0.5),
            *("--rate", 200, "--max-concurrency", 3, "--api-key-env", "MY_KEY"),
            *("--slo-ttft", 60_000, "--json", path, "--plot", plot, "--extra-body", '{"top_k": 4}'),
        )
    assert code == 0
    shown = capsys.readouterr()
    assert "12 / 0" in shown.out
    assert "TTFT ms" in shown.out
    assert "requests: 12 of 12" in shown.err
    assert "secret-word" not in shown.out + shown.err + path.read_text()
    assert len(server.bodies) == 13  # one to warm up
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret-word"}
    body = server.bodies[3]
    assert body["model"] == "fake-model"
    assert (body["temperature"], body["ignore_eos"], body["top_k"]) == (0, True, 4)
    found = json.loads(path.read_text())
    summary = found["summary"]
    wanted = [body["max_tokens"] for body in server.bodies[1:]]
    assert summary["num_output_tokens"] == sum(wanted)
    assert summary["num_prompt_tokens"] == 7 * 12
    assert summary["peak_concurrency"] <= 3
    assert summary["met_share"] == 1
    # Requests that go out together may arrive in another order.
    assert sorted(len(one["token_s"]) for one in found["requests"]) == sorted(wanted)
    assert plot.read_text().lstrip().startswith("<?xml")


def test_a_chat_and_a_server_that_counts_nothing(tmp_path, capsys):
    path = tmp_path / "o.json"
    with FakeOpenAi(usage=False) as server:
        flags = ("--api", "chat", "--model", "m", "--num-requests", 3, "--output-len", 4)
        assert bench("--base-url", server.url + "/", *flags, "--json", path, "--warm-up", 0) == 0
    assert server.bodies[0]["messages"][0]["role"] == "user"
    found = json.loads(path.read_text())
    assert found["summary"]["num_output_tokens"] == 12
    assert [one["num_output"] for one in found["requests"]] == [4, 4, 4]
    assert found["requests"][0]["ended_s"] >= found["requests"][0]["token_s"][-1]


def test_token_ids_and_what_is_not_asked_for():
    with FakeOpenAi() as server:
        flags = ("--prompts", "ids", "--vocab-size", 50, "--no-ignore-eos", "--prefix-len", 8)
        assert bench("--base-url", server.url, *flags, "--num-requests", 2, "--input-len", 5) == 0
    first, second = server.bodies[1:]
    assert len(first["prompt"]) == 13
    assert first["prompt"][:8] == second["prompt"][:8]
    assert max(first["prompt"]) < 50
    assert "ignore_eos" not in first


FAULTS = {
    "503": "2 x HTTP 503; the first: HTTP 503: {\"error\": {\"message\": \"too busy, sorry\"}}",
    "cut": "2 x stream cut; the first: stream cut: the connection ended within the answer",
    "unfinished": "2 x stream cut; the first: stream cut: the answer ended without its last event",
    "error": "2 x error in the stream; the first: error in the stream: {\"message\": \"no more\"}",
    "empty": "2 x empty answer; the first: empty answer: no token came",
    "garbage": "2 x no JSON; the first: no JSON",
    "hang": "2 x timeout; the first: timeout: no end within 0.5 s",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_failures_are_counted_and_shown(fault, capsys):
    with FakeOpenAi(lambda number: fault if number % 2 else "", usage=fault != "empty") as server:
        flags = ("--num-requests", 4, "--output-len", 5, "--warm-up", 0, "--max-concurrency", 1)
        assert bench("--base-url", server.url, *flags, "--timeout", 0.5) == 0
    shown = capsys.readouterr()
    assert "2 / 2" in shown.out
    assert FAULTS[fault] in " ".join(shown.out.split())
    assert "2 failed" in shown.err


def test_all_failed_is_an_exit_code(capsys):
    with FakeOpenAi(lambda number: "503") as server:
        assert bench("--base-url", server.url, "--num-requests", 3, "--max-concurrency", 1) == 69
    shown = capsys.readouterr()
    assert "0 / 3" in shown.out
    assert "warm-up: 1 of 1 failed: HTTP 503" in shown.err


def test_nobody_there(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert bench("--base-url", url) == 69
        assert f"xllm: {url}/models: " in capsys.readouterr().err
        assert bench("--base-url", url, "--model", "m", "--num-requests", 2) == 69
        assert "2 x no connection; the first: no connection: " in capsys.readouterr().out
        endpoint = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        assert bench("--zmq", endpoint) == 69
        assert endpoint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--base-url", "ftp://x"), "http://host:port/v1"),
        (("--rate", "0"), "rate must be above 0"),
        (("--extra-body", "[1]"), "--extra-body is no JSON object"),
        (("--extra-body", "{"), "--extra-body is no JSON object"),
        (("--trace", "/absent.csv"), "cannot read the trace /absent.csv"),
        (("--plot", "x.bmp"), "one of .png, .svg, .pdf"),
        (("--num-requests", "0"), "num-requests"),
    ],
)
def test_refused_options(flags, what, capsys):
    assert bench("--model", "m", *flags) == 64
    assert what in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench("--plot", "x.png") == 69
    assert 'pip install ".[plot]" in the directory of xLLM' in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / "toy")
    run_dir = tempfile.mkdtemp(prefix="xb-", dir="/tmp")
    with Served(model, run_dir) as served:
        yield served
    served.run_dir.rmdir()


@pytest.mark.process
@pytest.mark.parametrize("way", ["zmq", "completions", "chat"])
def test_xllm_itself(served, way, tmp_path, capsys):
    path = tmp_path / "o.json"
    flags = ["--num-requests", 6, "--input-len", 30, "--output-len", 12, "--json", path]
    if way == "zmq":
        flags += ["--zmq", served.zmq]
    else:
        flags += ["--base-url", served.http, "--api", way, "--vocab-size", 200]
        flags += ["--prompts", "ids"] if way == "completions" else []
    assert bench(*flags) == 0
    found = json.loads(path.read_text())
    assert found["summary"]["num_output_tokens"] == 72
    if way != "chat":
        assert found["summary"]["num_prompt_tokens"] == 180
    assert found["summary"]["errors"] == {}
