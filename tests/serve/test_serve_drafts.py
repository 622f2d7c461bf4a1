"""A service that guesses tokens: many streams at once are those of an engine that does not."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.served import Served, wait_until
from xllm import Client
from xllm.cli.model_source import demo_model_path
from xllm.cli.offline import OfflineEngine
from xllm.client.requests import build_submit
from xllm.config.load import load

pytestmark = pytest.mark.process

PROMPTS = [f"{word} is a block? " * 5 for word in ("What", "Which", "Where", "Who", "When", "Why")]


def options_of(number: int) -> dict:
    return {
        "max_tokens": 80 + number,
        "ignore_eos": True,
        "temperature": 0.0 if number % 3 else 0.5,
        "seed": number,
    }


@pytest.fixture(scope="module")
def expected():
    """What an engine in this process says, one request after another."""
    flags = {"model.path": demo_model_path(), "model.name": "m", "model.dtype": "float32"}
    flags |= {"worker.device": "cpu", "worker.num_threads": 1, "worker.kv_cache_bytes": 16 << 20}
    engine = OfflineEngine(load(flags, None, {}), lambda done, total: None)
    found = []
    for number, prompt in enumerate(PROMPTS):
        request = build_submit(1, options_of(number), timeout_s=60, stream=False, prompt=prompt)
        *_, end = engine.answer(request)
        found.append(tuple(end.choices[0].token_ids))
    engine.close()
    return found


def counted(served: Served, name: str) -> float:
    with urllib.request.urlopen(served.http.removesuffix("/v1") + "/metrics", timeout=20) as reply:
        rows = re.findall(rf"^xllm_master_{name}{{.*}} (\S+)$", reply.read().decode(), re.M)
    return sum(map(float, rows))


def test_streams_are_those_of_an_engine_without(expected, tmp_path_factory):
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xd').name}"
    flags = ("--engine", "native", "--model-dtype", "float32", "--worker-device", "cpu")
    flags += ("--worker-num-threads", "1", "--worker-kv-cache-bytes", str(16 << 20))
    flags += ("--scheduler-drafting", "prompt-lookup")
    with (
        Served(demo_model_path(), run_dir, *flags) as served,
        Client(served.zmq, timeout_s=60) as client,
        ThreadPoolExecutor(len(PROMPTS)) as threads,
    ):
        answers = [
            threads.submit(client.generate, prompt, **options_of(number))
            for number, prompt in enumerate(PROMPTS)
        ]
        for answer, tokens in zip(answers, expected, strict=True):
            assert tuple(answer.result(60).token_ids) == tokens
        wait_until(lambda: counted(served, "accepted_drafts") > 0, what="an accepted draft")
        assert counted(served, "drafts") > counted(served, "accepted_drafts")
    assert served.process.returncode == 0
    if served.run_dir.exists():
        served.run_dir.rmdir()  # empty: it took all that was its own away
