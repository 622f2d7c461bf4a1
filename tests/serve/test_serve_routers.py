"""`xllm serve --routers N`: one HTTP port for all of them, and none without which nobody serves."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, wait_until
from xllm import Client

pytestmark = pytest.mark.process
PROMPT = (70, 71, 72)
ROUTERS = {"router-0", "router-1"}


@pytest.fixture
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")


@pytest.fixture
def served(model, tmp_path_factory):
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('xr').name}", "--routers", "2") as served:
        yield served
    assert served.process.returncode == 0
    assert not served.run_dir.exists() or list(served.run_dir.iterdir()) == []
    if served.run_dir.exists():
        served.run_dir.rmdir()


def answering_router(served) -> str:
    """Which router a new connection comes to; it is asked for tokens, too."""
    base = served.http.removesuffix("/v1")
    body = {"model": "toy-model", "prompt": list(PROMPT), "max_tokens": 3, "temperature": 0}
    request = urllib.request.Request(
        f"{base}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 3
    with urllib.request.urlopen(f"{base}/metrics", timeout=30) as answer:
        return re.search(r'xllm_router_\w+{[^}]*instance="([^"]+)"', answer.read().decode())[1]


def endpoints(served) -> list[str]:
    return re.findall(r"ZeroMQ\s+(\S+)", served.text)


def test_each_router_tells_the_figures_of_all_and_none_twice(served):
    base = served.http.removesuffix("/v1")

    def has_both() -> bool:
        with urllib.request.urlopen(f"{base}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        series = [line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"]
        assert len(series) == len(set(series))
        found = re.findall(r'^xllm_router_leads{[^}]*router="([^"]+)"', text, re.M)
        return sorted(found) == ["router-0", "router-1"]

    # Each has to hear the other's first: several looks meet both.
    wait_until(lambda: all(has_both() for _ in range(8)), 30, "the figures of both routers")


def test_routers_share_a_port_and_stand_in_for_each_other(served, model):
    assert len(set(endpoints(served))) == 2
    for endpoint in endpoints(served):
        with Client(endpoint, timeout_s=30) as client:
            done = client.generate(PROMPT, max_tokens=20, seed=4)
            assert done.token_ids == expected_ids(model, PROMPT, 20, seed=4)
    seen = set()
    wait_until(lambda: seen.add(answering_router(served)) or len(seen) == 2, 30, "both routers")

    # One dies: the other serves, and it comes again where it was.
    started = re.findall(r"router-1: listens \(pid (\d+)\)", served.text)
    os.kill(int(started[-1]), signal.SIGKILL)
    first, second = endpoints(served)
    with Client(first, timeout_s=30) as client:
        done = client.generate(PROMPT, max_tokens=20, seed=4)
        assert done.token_ids == expected_ids(model, PROMPT, 20, seed=4)
    wait_until(
        lambda: len(re.findall(r"router-1: listens", served.text)) == len(started) + 1,
        30,
        "router-1 again",
    )
    # True of one that finds ready instances, too.
    again = re.findall(r"router-1: listens \(pid \d+\), (.*)", served.text)[-1]
    assert re.fullmatch(r"serves \S+ while an instance of the model is ready", again)
    with Client(second, timeout_s=30) as client:
        wait_until(lambda: client.health().ready, 30, "the new router's instance")
        done = client.generate(PROMPT, max_tokens=20, seed=4)
        assert done.token_ids == expected_ids(model, PROMPT, 20, seed=4)
    assert served.process.poll() is None


def test_a_router_that_drains_leaves_the_port_to_the_others(model, tmp_path_factory):
    flags = ("--routers", "2", "--worker-toy-step-ms", "10")
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('xd').name}", *flags) as served:
        wait_until(lambda: {answering_router(served) for _ in range(8)} == ROUTERS, 30, "both")
        with Client(endpoints(served)[1], discover=False, timeout_s=60) as client:
            words = client.stream(PROMPT, max_tokens=800, seed=4, ignore_eos=True)
            stream = iter(words)
            num_tokens = len(next(stream).token_ids)
            started = re.findall(r"router-1: listens \(pid (\d+)\)", served.text)
            os.kill(int(started[-1]), signal.SIGTERM)
            wait_until(lambda: "router-1: drains, 1 open" in served.text, 30, "the drain")
            for _ in range(20):
                assert answering_router(served) == "router-0"
            num_tokens += sum(len(word.token_ids) for word in stream)
        assert num_tokens == 800
        wait_until(
            lambda: {answering_router(served) for _ in range(8)} == ROUTERS, 30, "both again"
        )
    assert served.process.returncode == 0
