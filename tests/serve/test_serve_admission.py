"""Limits, the fair line and quick refusals of a running service, over HTTP and ZeroMQ."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time

import httpx
import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served
from xllm import AsyncClient, Client
from xllm.errors import OverloadedError, RateLimitError

pytestmark = pytest.mark.process

KEYS = {name: f"key-of-{name}-0123456789" for name in ("big", "small", "slow")}
NUM_FLOOD = 80


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two sequences at once, two more wait at the instance, 90 in the router."""
    here = tmp_path_factory.mktemp("admission")
    model = make_toy_model(here / "toy")
    keys = here / "keys"
    keys.touch(mode=0o600)
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    limits = here / "limits.toml"
    limits.write_text("[slow]\nrequests_per_minute = 2\n")
    run_dir = f"/tmp/{tmp_path_factory.mktemp('xq').name}"
    flags = {
        "--router-api-key-file": keys,
        "--admission-tenant-limits-file": limits,
        "--admission-instance-waiting": 2,
        "--admission-queue-size": 90,
        "--scheduler-max-num-seqs": 2,
        "--worker-toy-step-ms": 5,
    }
    options = [str(part) for pair in flags.items() for part in pair]
    with Served(model, run_dir, *options, "--no-serve-kvcache") as served:
        yield served
    with contextlib.suppress(OSError):
        pathlib.Path(run_dir).rmdir()


def post(client: httpx.AsyncClient, served: Served, tenant: str, **more):
    body = {"model": "toy", "prompt": "hello", "max_tokens": 4, "ignore_eos": True, **more}
    headers = {"authorization": f"Bearer {KEYS[tenant]}"}
    return client.post(served.http + "/completions", json=body, headers=headers)


def metric(served: Served, name: str) -> float:
    headers = {"authorization": f"Bearer {KEYS['big']}"}
    text = httpx.get(served.http.removesuffix("/v1") + "/metrics", headers=headers).text
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
    return sum(map(float, values))


def is_flooded(served: Served) -> bool:
    return metric(served, "xllm_router_queue_length") >= NUM_FLOOD / 2


def http_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=400)
    return httpx.AsyncClient(timeout=120, limits=limits)


def test_a_flood_of_one_tenant_leaves_another_alone(served):
    """The small tenant's requests, one after the other, overtake the flood that waits."""

    async def scenario() -> None:
        ended = 0

        async def flood(client) -> None:
            nonlocal ended
            answer = await post(client, served, "big", max_tokens=8)
            assert answer.status_code == 200
            ended += 1

        async with http_client() as client, asyncio.TaskGroup() as group:
            for _ in range(NUM_FLOOD):
                group.create_task(flood(client))
            async with asyncio.timeout(30):
                while not await asyncio.to_thread(is_flooded, served):
                    await asyncio.sleep(0.01)
            overtaken = []
            for _ in range(5):
                before = ended
                answer = await post(client, served, "small")
                assert answer.status_code == 200
                overtaken.append(ended - before)
            # What ran or waited at the instance, and a turn of the other tenant in the line,
            # end first; without the line it would be all of the flood.
            assert sorted(overtaken)[2] <= 10, overtaken
            assert max(overtaken) <= NUM_FLOOD / 3, overtaken
            assert ended < NUM_FLOOD, "the flood was over: there was no load"

    asyncio.run(scenario())
    assert metric(served, "xllm_router_queue_seconds_count") >= NUM_FLOOD / 2


def test_overload_is_answered_quickly_and_says_when_to_come_back(served):
    async def scenario() -> None:
        async with http_client() as client:
            began = time.monotonic()
            answers = []

            async def ask() -> None:
                answer = await post(client, served, "big", max_tokens=8)
                answers.append((time.monotonic() - began, answer))

            async with asyncio.TaskGroup() as group:
                for _ in range(150):
                    group.create_task(ask())
            good = [at for at, answer in answers if answer.status_code == 200]
            refused = [(at, answer) for at, answer in answers if answer.status_code == 429]
            assert len(good) + len(refused) == 150
            assert 90 <= len(good) <= 110
            for _, answer in refused:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "overloaded"
            # They do not wait for room: all are told long before those who waited are served.
            assert max(at for at, _ in refused) < max(good)

    asyncio.run(scenario())
    assert metric(served, 'xllm_router_rejections_total{reason="queue"') >= 30


def test_a_tenants_limit_over_http(served):
    async def scenario() -> None:
        async with http_client() as client:
            statuses = []
            for _ in range(3):
                answer = await post(client, served, "slow")
                statuses.append(answer.status_code)
            assert statuses == [200, 200, 429]
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(answer.headers["retry-after"]) <= 30
            assert (await post(client, served, "small")).status_code == 200

    asyncio.run(scenario())


def test_overload_over_zmq_says_when_to_come_back(served):
    async def scenario() -> list[BaseException | object]:
        async with AsyncClient(served.zmq) as client:
            asked = [client.generate("hello", max_tokens=8, ignore_eos=True) for _ in range(150)]
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(scenario())
    refused = [one for one in answers if isinstance(one, OverloadedError)]
    assert len(refused) >= 30
    assert len(answers) - len(refused) >= 90
    assert all(one.retry_after_s >= 0.1 for one in refused)
    assert not any(isinstance(one, RateLimitError) for one in refused)


def test_the_status_shows_what_waits(served):
    with Client(served.zmq) as client:
        router = next(one for one in client.status() if one.kind == "router")
        assert router.num_waiting == 0
        assert all(one.breaker == "" for one in client.status())
