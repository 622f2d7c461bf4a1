"""Prompts that begin alike find what is cached, at whichever instance it is."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib

import httpx
import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served, wait_until
from xllm import AsyncClient, Client
from xllm.router.text.model import load_text_model

pytestmark = pytest.mark.process

NUM_TALKS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xp').name}"
    with Served(model, run_dir, "--instances", "3", "--no-serve-kvcache") as served:
        yield served
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


def metrics(served: Served, start: str) -> float:
    text = httpx.get(served.http.removesuffix("/v1") + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return sum(float(line.split()[-1]) for line in lines)


def held_blocks(served: Served) -> list[float]:
    """Cached blocks of each instance, as it last said."""
    name = "xllm_master_cached_blocks"
    return [metrics(served, f'{name}{{role="master",instance="instance-{k}"') for k in range(3)]


def num_ready(served: Served) -> int:
    with Client(served.zmq) as client:
        return sum(one.kind == "instance" and one.state == "ready" for one in client.status())


def ask_all(served: Served, prompts: list[str], **more) -> list[int]:
    """Cached tokens of each, asked at once."""

    async def scenario() -> list[int]:
        async with AsyncClient(served.zmq) as client:
            asked = [client.generate(one, max_tokens=2, ignore_eos=True, **more) for one in prompts]
            return [answer.usage.cached_tokens for answer in await asyncio.gather(*asked)]

    return asyncio.run(scenario())


def test_second_turns_go_where_the_first_ones_are_cached(served, model):
    wait_until(lambda: num_ready(served) == 3, what="three instances")
    text = load_text_model(model)
    talks = [f"talk {k}: " + f"word{k} and more " * 12 for k in range(NUM_TALKS)]
    blocks = [len(text.encode(talk)) // 16 for talk in talks]
    assert min(blocks) >= 3
    assert ask_all(served, talks) == [0] * NUM_TALKS
    known = "xllm_router_expected_hit_blocks_total"
    before = metrics(served, known)
    wait_until(
        lambda: metrics(served, "xllm_kv_index_blocks") >= sum(blocks), what="all blocks are known"
    )
    found = ask_all(served, [talk + "and then?" for talk in talks])
    # Where the text goes on, its last tokens may be others.
    assert [cached >= (num - 1) * 16 for cached, num in zip(found, blocks, strict=True)] == (
        [True] * NUM_TALKS
    )
    assert metrics(served, known) - before >= sum(blocks) - NUM_TALKS
    assert metrics(served, 'xllm_router_routes_total{reason="prefix"') >= NUM_TALKS
    wait_until(lambda: min(held_blocks(served)) > 0, what="blocks at each instance")


def test_a_session_stays_where_it_began(served):
    talks = [f"turn {k} of a talk that shares nothing, {k} " * 8 for k in range(6)]
    before = metrics(served, 'xllm_router_routes_total{reason="session"')
    ask_all(served, talks, session="talk")
    assert metrics(served, 'xllm_router_routes_total{reason="session"') - before == len(talks)
