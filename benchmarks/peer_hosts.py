"""What the peer driver drives: a master in this process with its worker, or `xllm serve`.

A host is opened in the driver's loop; `run(requests)` submits all at once and gives the clock of
the start, and by request the clocks of its first and last token and the number of its tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import time
from typing import Protocol

from xllm.cli.bench.http_stream import HttpAddress, HttpStreams
from xllm.cli.startup import ServiceAddresses
from xllm.cli.targets import run_worker
from xllm.client.asynchronous import AsyncClient
from xllm.config.environment import runtime_base
from xllm.config.settings import Settings
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.master.actor import MasterActor
from xllm.protocol.actor.logs import configure_logs
from xllm.protocol.actor.process_limits import set_process_limits
from xllm.protocol.actor.rundir import RunDirectory
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import AdmitRequest, InstanceReply, TokenBatch
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.dealer import DealerSocket

Requests = list[tuple[list[int], int]]
LIMIT_S = 1800.0
START_S = 600.0


class Clocks:
    """When each request's tokens came."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.counts: dict[int, int] = {}

    def tokens(self, index: int, count: int) -> None:
        """Request `index` has got `count` more tokens, now."""
        now = time.perf_counter()
        self.first.setdefault(index, now)
        self.last[index] = now
        self.counts[index] = self.counts.get(index, 0) + count

    def result(self) -> tuple[float, dict[int, float], dict[int, float], dict[int, int]]:
        """As workloads.metrics takes it."""
        return self.start, self.first, self.last, self.counts


class Host(Protocol):
    """What the driver talks to."""

    async def open(self) -> None:
        """Ready to serve, or an error."""

    async def run(self, requests: Requests) -> Clocks:
        """All requests at once, to their ends."""

    async def close(self) -> None:
        """Ends every process."""


class EngineHost:
    """The whole engine: a master in this process, its worker as its child, and a socket to the
    master as a router has one. The hashes of the prompts' blocks, which routers make, are made
    here, within the time that is measured."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: dict[str, int] = {}
        self._clocks = Clocks()
        self._failure = ""
        self._done = asyncio.Event()
        self._serial = 0

    async def open(self) -> None:
        """Start the worker and wait until the model is loaded."""
        cluster = self._settings.cluster
        set_process_limits()
        configure_logs(process="driver", level=cluster.log_level, log_dir=cluster.log_dir)
        self._directory = RunDirectory(cluster.run_dir or runtime_base())
        self._master = MasterActor(self._with_run_dir(), run_worker)
        await self._master.open()
        await self._wait_ready()
        record = self._master.models[0].record()
        self._block_size = record.block_size
        self._root = root_hash(record.revision)
        self._socket: DealerSocket[InstanceReply] = DealerSocket(
            self._master.transport, record.endpoint, Decoder(InstanceReply), self._take
        )
        gc.collect()
        gc.freeze()

    async def run(self, requests: Requests) -> Clocks:
        """See Host."""
        await self._wait_ready()  # a worker that was lost in the run before starts again
        self._serial += 1
        self._open.clear()
        self._clocks, self._failure = Clocks(), ""
        self._done.clear()
        for index, (prompt, count) in enumerate(requests):
            name = f"{self._serial}-{index}"
            self._open[name] = index
            self._socket.send(
                AdmitRequest(
                    request_id=name,
                    attempt=1,
                    model=self._settings.model.name,
                    prompt_ids=tuple(prompt),
                    sampling=SamplingParams(
                        max_tokens=count, temperature=0.0, ignore_eos=True, seed=0
                    ),
                    block_hashes=chain_hashes(self._root, prompt, self._block_size),
                )
            )
        async with asyncio.timeout(LIMIT_S):
            await self._done.wait()
        if self._failure:
            raise RuntimeError(self._failure)
        return self._clocks

    async def close(self) -> None:
        """See Host."""
        self._socket.close()
        await self._master.close()
        self._directory.remove()

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while self._master.models[0].state != "ready":
            if self._master.stopping or time.monotonic() > deadline:
                raise RuntimeError(f"the instance is not ready: {self._master.stop_reason}")
            await asyncio.sleep(0.02)

    def _with_run_dir(self) -> Settings:
        settings = self._settings
        cluster = dataclasses.replace(settings.cluster, run_dir=self._directory.path)
        master = dataclasses.replace(settings.master, name="driver")
        return dataclasses.replace(settings, cluster=cluster, master=master)

    def _take(self, message: InstanceReply, frames: list[bytes]) -> None:
        if not isinstance(message, TokenBatch):
            self._failure = f"the master said {message}"
            self._done.set()
            return
        for item in message.items:
            self._clocks.tokens(self._open[item.request_id], len(item.token_ids))
        for end in message.ended:
            if end.code:
                self._failure = f"{end.code}: {end.message}"
            del self._open[end.request_id]
        if not self._open:
            self._done.set()


class ZmqHost:
    """`xllm serve` through the client library, prompts as token ids."""

    def __init__(self, addresses: ServiceAddresses) -> None:
        self._client = AsyncClient(addresses.zmq, timeout_s=LIMIT_S)

    async def open(self) -> None:
        """See Host."""
        await self._client.health(probe=True)

    async def run(self, requests: Requests) -> Clocks:
        """See Host."""
        clocks = Clocks()
        await asyncio.gather(
            *(self._one(clocks, index, *request) for index, request in enumerate(requests))
        )
        return clocks

    async def _one(self, clocks: Clocks, index: int, prompt: list[int], count: int) -> None:
        stream = self._client.stream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True)
        async for delta in stream:
            if delta.token_ids:
                clocks.tokens(index, len(delta.token_ids))

    async def close(self) -> None:
        """See Host."""
        await self._client.aclose()


class HttpHost:
    """`xllm serve` through /v1/completions, streamed. An event may hold several tokens, or none
    of text: the first event is the first token, the usage at the end counts them."""

    def __init__(self, addresses: ServiceAddresses, model: str) -> None:
        self._streams = HttpStreams(HttpAddress.parse(addresses.http + "/v1"))
        self._model = model

    async def open(self) -> None:
        """See Host."""
        await self._streams.get("/models")

    async def run(self, requests: Requests) -> Clocks:
        """See Host."""
        clocks = Clocks()
        await asyncio.gather(
            *(self._one(clocks, index, *request) for index, request in enumerate(requests))
        )
        return clocks

    async def _one(self, clocks: Clocks, index: int, prompt: list[int], count: int) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage = None
        async for data in self._streams.post_events("/completions", json.dumps(body).encode()):
            if data == b"[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            usage = event.get("usage") or usage
            if event["choices"]:
                clocks.tokens(index, 0)
        if usage is None:
            raise RuntimeError("the stream ended without its usage")
        clocks.counts[index] = usage["completion_tokens"]

    async def close(self) -> None:
        """See Host."""
        self._streams.close()
