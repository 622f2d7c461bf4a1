"""A registry, fake instances, one router and its clients in one loop, over real sockets."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from tests.router.fake_instance import HEARTBEAT_S, MODEL, FakeInstance
from tests.router.model_dirs import byte_level_tokenizer, write_model
from xllm.config.cluster import ClusterSettings
from xllm.config.router import RouterSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.protocol.client import BadMessage, RouterMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import RequestFailed, RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.router.actor import RouterActor

MODEL_TOKENIZER = byte_level_tokenizer()


class RawClient:
    """Speaks the client's conversation and keeps all answers by number."""

    def __init__(self, transport, endpoint) -> None:
        self.heard: dict[int, list] = {}
        self.bad: list[BadMessage] = []
        self.socket = DealerSocket(transport, endpoint, Decoder(RouterMessage), self._on_message)

    def _on_message(self, message, frames) -> None:
        if isinstance(message, BadMessage):
            self.bad.append(message)
        else:
            self.heard.setdefault(message.id, []).append(message)

    def submit(self, number, max_tokens=8, prompt="hello", **more) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.socket.send(SubmitRequest(id=number, prompt=prompt, sampling=sampling, **more))

    async def last(self, number, kind=(RequestFinished, RequestFailed)):
        await until(lambda: any(isinstance(m, kind) for m in self.heard.get(number, ())))
        return next(m for m in self.heard[number] if isinstance(m, kind))

    def ids(self, number) -> list[int]:
        found = []
        for one in self.heard.get(number, ()):
            if isinstance(one, TokenDelta):
                assert one.first_index == len(found)
                found += one.token_ids
        return found


async def until(condition, timeout_s=10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


class Bench:
    """A registry, instances, one router and clients in one loop."""

    def __init__(self, run_dir, tmp_path, **router) -> None:
        self.run_dir = run_dir
        self.transport = Transport()
        self.server = EmbeddedRegistryServer(self.transport, f"ipc://{run_dir}/registry")
        self.registry = self.server.registry
        model = write_model(tmp_path / "model", MODEL_TOKENIZER)
        self.settings = Settings(
            cluster=ClusterSettings(
                registry=self.server.endpoint,
                run_dir=str(run_dir),
                heartbeat_s=HEARTBEAT_S * 2,
                shutdown_s=0.3,
            ),
            model=ModelSettings(path=str(model), name=MODEL),
            router=RouterSettings(name="r", port=0, zmq_port=0, **router),
        )
        self.router = RouterActor(self.settings)
        self.instances: list[FakeInstance] = []
        self.clients: list[RawClient] = []
        self.closed = False

    async def instance(self, name, **more) -> FakeInstance:
        one = FakeInstance(self.transport, self.registry, self.run_dir, name, **more)
        self.instances.append(one)
        await one.register()
        view = self.router.service.view
        await until(lambda: any(seen.name == name for seen in view.usable(MODEL)))
        return one

    def client(self) -> RawClient:
        one = RawClient(self.transport, self.router.zmq.endpoint)
        self.clients.append(one)
        return one

    async def stop(self) -> None:
        if not self.closed:
            self.closed = True
            await self.router.close()


@asynccontextmanager
async def bench(run_dir, tmp_path, **router):
    made = Bench(run_dir, tmp_path, **router)
    try:
        await made.router.open()
        yield made
        made.router.service.dispatcher.check()
        made.router.service.view.check()
    finally:
        await made.stop()
        for one in made.clients:
            one.socket.close()
        for one in made.instances:
            one.close()
        await made.server.close()
        made.transport.close()
