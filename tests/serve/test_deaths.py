"""Deaths under streams, in real processes: whatever dies, each answer is the undisturbed one.

One cluster with two routers and two instances of the toy engine. Every kind of request runs over
ZeroMQ and HTTP, streamed and whole, while an instance is killed, another one freezes, a router is
killed, and a thousand clients leave; each answer is compared with what the same request gave
before any of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import urllib.parse
import urllib.request

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.serve.served import Served, alive, wait_until
from xllm import AsyncClient
from xllm.cli.bench.http_stream import CutError, HttpAddress, HttpStreams

pytestmark = pytest.mark.process

PROMPT = (70, 71, 72, 73)
TOKENS = 120
MID = 8
"""Tokens of each stream that are there when something dies."""


@dataclasses.dataclass
class Case:
    """One request in all its ways; `seen`: what came of its stream so far, over HTTP or ZeroMQ."""

    name: str
    options: dict
    whole_only: bool = False


def cases(reference) -> list[Case]:
    """`reference`: an undisturbed answer with the first options, to take stops from."""
    ids, text = reference.token_ids, reference.text
    sampled = {"seed": 11, "temperature": 0.9}
    late = [one for one in dict.fromkeys(ids) if ids.index(one) > TOKENS // 2]
    return [
        Case("sampled", sampled),
        Case("greedy", {"temperature": 0}),
        Case("three choices", {**sampled, "n": 3}),
        Case("stop string", {**sampled, "stop": [text[-40:-30], "never said"]}),
        Case("stop id", {**sampled, "stop_token_ids": [late[0]]}),
        Case("logprobs", {**sampled, "logprobs": 2}),
        Case("penalties", {**sampled, "repetition_penalty": 1.2, "frequency_penalty": 0.5}),
        Case("min_tokens", {**sampled, "stop": [text[:3]], "min_tokens": TOKENS // 2}),
        Case("prompt logprobs", {**sampled, "prompt_logprobs": 1}, whole_only=True),
    ]


def comparable(done) -> tuple:
    """All of an answer that must not depend on what died."""
    return (
        done.choices,
        done.usage.prompt_tokens,
        done.usage.completion_tokens,
        done.prompt_logprobs,
    )


class Bench:
    """The clients of one test: the cases as streams and whole, on both routers and over HTTP."""

    def __init__(self, served: Served) -> None:
        endpoints = re.findall(r"ZeroMQ\s+(\S+)", served.text)
        self.served = served
        self.clients = [AsyncClient(endpoints), AsyncClient(endpoints[::-1])]
        self.http = HttpStreams(HttpAddress.parse(served.http))
        self.progress: dict[str, int] = {}
        self.num_cuts = 0

    async def ask(self, case: Case, client: AsyncClient, streams: bool):
        options = {"max_tokens": TOKENS, "ignore_eos": True, "timeout_s": 60, **case.options}
        if not streams:
            return comparable(await client.generate(PROMPT, **options))
        label = f"{case.name} {id(client)}"
        self.progress[label] = 0
        stream = client.stream(PROMPT, **options)
        async for delta in stream:
            self.progress[label] += len(delta.token_ids)
        return comparable(stream.completion)

    def body(self, case: Case) -> bytes:
        fields = {"model": "toy-model", "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
        fields |= {"stream": True, "stream_options": {"include_usage": True}, **case.options}
        return json.dumps(fields).encode()

    async def ask_http(self, case: Case) -> tuple:
        """The stream's texts, reasons and usage; a cut one is resumed."""
        body, last_id, done = self.body(case), "", False
        label = f"{case.name} http"
        self.progress[label] = 0
        texts, reasons, usage, logprobs = {}, {}, {}, []
        while not done:
            try:
                async with contextlib.aclosing(
                    self.http.post_stream("/completions", body, last_id)
                ) as events:
                    async for event in events:
                        last_id = event.id
                        if event.data == b"[DONE]":
                            done = True
                            continue
                        chunk = json.loads(event.data)
                        assert "error" not in chunk, chunk
                        usage = chunk.get("usage") or usage
                        for choice in chunk["choices"]:
                            k = choice["index"]
                            texts[k] = texts.get(k, "") + choice["text"]
                            self.progress[label] += bool(choice["text"])
                            if choice["finish_reason"]:
                                assert k not in reasons
                                reasons[k] = choice["finish_reason"]
                            if choice["logprobs"]:
                                logprobs += choice["logprobs"]["tokens"]
            except (CutError, OSError):
                self.num_cuts += 1
                assert self.num_cuts < 1000
                await asyncio.sleep(0.01)
        return texts, reasons, usage["completion_tokens"], logprobs

    async def run(self, found: list[Case], strike=None) -> dict[str, tuple]:
        """All ways of all cases, with something that happens in the midst of the streams."""
        tasks = {}
        for case in found:
            for k, client in enumerate(self.clients):
                tasks[f"{case.name} whole {k}"] = self.ask(case, client, False)
                tasks[f"{case.name} stream {k}"] = self.ask(case, client, True)
            if not case.whole_only:
                tasks[f"{case.name} http"] = self.ask_http(case)
        running = {name: asyncio.ensure_future(work) for name, work in tasks.items()}
        try:
            if strike is not None:
                async with asyncio.timeout(60):
                    while min(self.progress.values(), default=0) < MID:
                        await asyncio.sleep(0.005)
                assert not any(one.done() for one in running.values())
                await strike()
            return dict(zip(running, await asyncio.gather(*running.values()), strict=True))
        finally:
            for one in running.values():
                one.cancel()

    async def close(self) -> None:
        for client in self.clients:
            if client._connection is not None:
                client.connection.check()
            await client.aclose()
        self.http.close()


def in_bench(served, test):
    async def main():
        bench = Bench(served)
        try:
            return await asyncio.wait_for(test(bench), 150)
        finally:
            await bench.close()

    return asyncio.run(main())


def run_undisturbed(served, model):
    """The cases and what they give while nothing dies."""

    async def body(bench):
        first = await bench.clients[0].generate(
            PROMPT, max_tokens=TOKENS, ignore_eos=True, seed=11, temperature=0.9
        )
        assert first.token_ids == expected_ids(model, PROMPT, TOKENS, seed=11, temperature=0.9)
        found = cases(first)
        answers = await bench.run(found)
        for case in found:
            names = [f"{case.name} {way} {k}" for way in ("whole", "stream") for k in (0, 1)]
            assert [answers[name] for name in names] == [answers[names[0]]] * 4
        stops = {case.name: answers[f"{case.name} whole 0"][0][0] for case in found}
        assert stops["stop string"].stop_reason == first.text[-40:-30]
        assert isinstance(stops["stop id"].stop_reason, int)
        assert stops["min_tokens"].finish_reason in ("stop", "length")
        assert len(stops["min_tokens"].token_ids) >= TOKENS // 2
        return found, answers

    return in_bench(served, body)


def metric(served, name) -> float:
    """Of all routers, as one of them has heard."""
    base = served.http.removesuffix("/v1")
    with urllib.request.urlopen(f"{base}/metrics", timeout=20) as response:
        text = response.read().decode()
    return sum(float(one) for one in re.findall(rf"^{name}{{[^}}]*}} (\S+)", text, re.M))


def pid_of(served, name: str) -> int:
    """Of a process by its own name, as the launcher showed it last; not of a worker of its."""
    return int(re.findall(rf"\b{name}: \w+ \(pid (\d+)\)", served.text)[-1])


def instances_ready(served) -> bool:
    async def body(bench):
        found = await bench.clients[0].status(timeout_s=10)
        ready = [one for one in found if one.kind == "instance" and one.state == "ready"]
        return len(ready) == 2

    return in_bench(served, body)


def check(answers, undisturbed) -> None:
    _, wanted = undisturbed
    assert answers.keys() == wanted.keys()
    wrong = [name for name in wanted if answers[name] != wanted[name]]
    assert not wrong


def kill_an_instance(served, undisturbed):
    victim = pid_of(served, "instance-0")

    async def strike():
        os.kill(victim, signal.SIGKILL)

    async def body(bench):
        answers = await bench.run(undisturbed[0], strike)
        assert bench.num_cuts == 0  # HTTP clients noticed nothing
        return answers

    check(in_bench(served, body), undisturbed)
    assert not alive([victim])
    wait_until(lambda: instances_ready(served), 60, "the instance's return")


def freeze_an_instance_and_thaw_it(served, undisturbed):
    victim = pid_of(served, "instance-1")

    async def strike():
        os.kill(victim, signal.SIGSTOP)
        async with asyncio.timeout(30):
            while " (stopped)" not in pathlib.Path(f"/proc/{victim}/status").read_text():
                await asyncio.sleep(0.01)

    async def body(bench):
        try:
            return await bench.run(undisturbed[0], strike)
        finally:
            os.kill(victim, signal.SIGCONT)

    check(in_bench(served, body), undisturbed)
    wait_until(lambda: instances_ready(served), 60, "the instance's return")
    check(in_bench(served, lambda bench: bench.run(undisturbed[0])), undisturbed)


def kill_a_router(served, undisturbed):
    victim = pid_of(served, "router-0")

    async def strike():
        os.kill(victim, signal.SIGKILL)

    async def body(bench):
        answers = await bench.run(undisturbed[0], strike)
        resumed = [client.connection.statistics().num_resumed for client in bench.clients]
        assert sorted(resumed)[0] == 0  # the other router's client noticed nothing
        assert sorted(resumed)[1] >= 2 * len(undisturbed[0])
        return answers

    check(in_bench(served, body), undisturbed)
    assert not alive([victim])
    ask_the_returned_router(served, undisturbed)


def ask_the_returned_router(served, undisturbed) -> None:
    """Whoever asks it in the moment in which its socket is there, and no other router, is answered:
    it has not heard of an instance then."""
    endpoint = re.findall(r"ZeroMQ\s+(\S+)", served.text)[0]
    options = {"max_tokens": TOKENS, "ignore_eos": True, "seed": 11, "temperature": 0.9}
    wanted = undisturbed[1]["sampled whole 0"]

    async def answered(client) -> tuple:
        return comparable(await client.generate(PROMPT, **options))

    async def streamed(client) -> tuple:
        stream = client.stream(PROMPT, **options)
        async for _ in stream:
            pass
        return comparable(stream.completion)

    async def main() -> None:
        address = urllib.parse.urlsplit(endpoint)
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(address.hostname, address.port)
                    break
                await asyncio.sleep(0.002)
        async with AsyncClient([endpoint], discover=False) as client:
            whole = [answered(client) for _ in range(8)]
            streams = [streamed(client) for _ in range(8)]
            assert await asyncio.gather(*whole, *streams) == [wanted] * 16
        writer.close()

    asyncio.run(asyncio.wait_for(main(), 90))


def num_open(served) -> float:
    return metric(served, "xllm_router_open_requests")


def storm_of_leavers(served, undisturbed):
    """A thousand: waiting, computing, with several choices; by HTTP and ZeroMQ."""
    endpoints = re.findall(r"ZeroMQ\s+(\S+)", served.text)
    address = HttpAddress.parse(served.http)

    async def by_zmq() -> None:
        for n in (1, 3):
            client = AsyncClient(endpoints, discover=False)
            options = {"max_tokens": 400, "n": n, "ignore_eos": True}
            streams = [client.stream(PROMPT, **options) for _ in range(150)]
            async with asyncio.timeout(60):
                await asyncio.gather(*(stream.read() for stream in streams[:20]))
            await client.aclose()

    async def by_http() -> None:
        fields = {"model": "toy-model", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
        for stream in (True, False):
            body = json.dumps({**fields, "stream": stream}).encode()
            head = f"POST {address.path}/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            for _ in range(7):
                writers = []
                for _ in range(50):
                    _, writer = await asyncio.open_connection(address.host, address.port)
                    writer.write(head.encode() + body)
                    writers.append(writer)
                await asyncio.gather(*(writer.drain() for writer in writers))
                for writer in writers:
                    writer.transport.abort()

    async def storm() -> None:
        await asyncio.gather(by_zmq(), by_http())

    asyncio.run(asyncio.wait_for(storm(), 120))

    async def nothing_runs(bench) -> bool:
        rows = await bench.clients[0].status(timeout_s=10)
        return sum(one.num_running + one.num_waiting for one in rows if one.kind == "instance") == 0

    wait_until(lambda: num_open(served) == 0, 30, "an empty table of requests")
    wait_until(lambda: in_bench(served, nothing_runs), 30, "instances without sequences")
    check(in_bench(served, lambda bench: bench.run(undisturbed[0])), undisturbed)


def test_no_death_changes_an_answer(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")
    flags = ("--instances", "2", "--routers", "2", "--worker-toy-step-ms", "10")
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('fo').name}", *flags) as served:
        undisturbed = run_undisturbed(served, model)
        kill_an_instance(served, undisturbed)
        freeze_an_instance_and_thaw_it(served, undisturbed)
        kill_a_router(served, undisturbed)
        storm_of_leavers(served, undisturbed)
