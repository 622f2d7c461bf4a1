"""Over sockets: requests that wait for a listed instance, and those for which there is none."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

from tests.router.fake_instance import MODEL, FakeInstance, drawn
from tests.router.router_bench import until
from xllm.protocol.generation import RequestFinished, SubmitRequest
from xllm.protocol.questions import QueryHealth
from xllm.protocol.sampling import SamplingParams


async def post(address: str, stream: bool) -> tuple[int, bytes]:
    """The status and body of a completion of four tokens over HTTP."""
    fields = {"model": MODEL, "prompt": [70, 71, 72], "max_tokens": 4, "stream": stream}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(fields).encode(),
        {"content-type": "application/json"},
    )

    def ask() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(ask)


def test_over_http_and_zeromq_requests_wait_for_a_listed_instance(in_bench):
    async def body(b):
        one = FakeInstance(b.transport, b.registry, b.run_dir, "a", beats=False)
        b.instances.append(one)
        await one.register()
        view, admission = b.router.service.view, b.router.service.admission
        await until(lambda: view.get("a") is not None)
        client = b.client()
        client.submit(1, 4)
        client.submit(2, 4, prompt=(70, 71, 72), stream=False)
        answers = [asyncio.ensure_future(post(b.router.http_address, on)) for on in (True, False)]
        await until(lambda: admission.num_waiting == 4)
        client.socket.send(QueryHealth(id=3))
        await until(lambda: 3 in client.heard)
        assert not client.heard[3][0].ready
        assert not one.admits
        one.beats = True
        assert isinstance(await client.last(1), RequestFinished)
        assert client.ids(1) == [drawn(k) for k in range(4)]
        whole = await client.last(2)
        assert whole.choices[0].token_ids == tuple(drawn(k) for k in range(4))
        (status, events), (whole_status, text) = await asyncio.gather(*answers)
        assert (status, whole_status) == (200, 200)
        assert events.rstrip().endswith(b"[DONE]")
        assert json.loads(text)["usage"]["completion_tokens"] == 4
        assert len(one.admits) == 4

    in_bench(body)


def test_a_cluster_that_lists_nobody_says_so_at_once(in_bench):
    async def body(b):
        client = b.client()
        client.submit(1, 4)
        last = await client.last(1)
        assert (last.code, last.retry_after_ms) == ("unavailable", 1000)
        status, text = await post(b.router.http_address, True)
        assert status == 503
        assert json.loads(text)["error"]["code"] == "unavailable"

    in_bench(body)


def test_a_client_that_leaves_takes_a_waiting_request_along(in_bench):
    async def body(b):
        one = FakeInstance(b.transport, b.registry, b.run_dir, "a", beats=False)
        b.instances.append(one)
        await one.register()
        service = b.router.service
        await until(lambda: service.view.get("a") is not None)
        client = b.client()
        sampling = SamplingParams(max_tokens=4)
        client.socket.send(SubmitRequest(id=1, prompt="hello", sampling=sampling))
        await until(lambda: service.admission.num_waiting == 1)
        client.socket.close()
        await until(lambda: service.num_open == 0)
        assert service.admission.num_waiting == 0
        one.beats = True
        await until(lambda: service.view.usable(MODEL))
        assert not one.admits

    in_bench(body)
