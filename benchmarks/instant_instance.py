"""An instance that takes no time: registry and master's side of the protocol, without a scheduler.

    python -m benchmarks.instant_instance --run-dir DIR --name i-0 [--registry-here] --model NAME
        --vocab-size N

It registers, beats and answers each AdmitRequest at once with as many tokens as were asked for:
what stands before it is all that a measurement sees. With `--registry-here` it serves the
cluster's registry too (at `ipc://DIR/registry`).
"""

from __future__ import annotations

import argparse
import asyncio

import uvloop

from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import (
    AdmitRequest,
    InstanceRequest,
    ProbeAnswer,
    ProbeInstance,
    RequestEnded,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.records import InstanceRecord, instance_key
from xllm.protocol.registry.embedded import EmbeddedRegistryServer
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket

BEAT_S = 0.2
TOKEN = 17


class InstantInstance:
    """One of them, in a running loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        where = f"ipc://{options.run_dir}"
        self.transport = Transport()
        self.served = None
        if options.registry_here:
            self.served = EmbeddedRegistryServer(self.transport, f"{where}/registry")
        self.registry = open_registry(f"{where}/registry", self.transport)
        self.socket: RouterSocket[InstanceRequest] = RouterSocket(
            self.transport, f"{where}/{options.name}", Decoder(InstanceRequest), self.on_message
        )
        self.bus = PublisherSocket(self.transport, f"{where}/{options.name}-bus")
        self.owed: dict[bytes, tuple[list[TokenItem], list[RequestEnded]]] = {}

    async def run(self) -> None:
        options = self.options
        record = InstanceRecord(
            name=options.name,
            incarnation=options.name,
            endpoint=self.socket.endpoint,
            bus_endpoint=self.bus.endpoint,
            model=options.model,
            model_path="",
            max_model_len=1 << 20,
            vocab_size=options.vocab_size,
            block_size=16,
            num_blocks=1 << 20,
        )
        key = instance_key("default", options.name)
        await self.registry.put(key, encode(record))
        print("READY", flush=True)
        for seq in range(1, 1 << 40):
            beat = InstanceHeartbeat(
                options.name, options.name, seq, "ready", load=InstanceLoad(num_free_blocks=1 << 20)
            )
            self.bus.publish(b"instance", beat)
            await asyncio.sleep(BEAT_S)

    def on_message(self, identity: bytes, message: InstanceRequest, frames: list[bytes]) -> None:
        if isinstance(message, AdmitRequest):
            if not self.owed:  # all that came in this turn of the loop is one step
                asyncio.get_running_loop().call_soon(self.answer)
            items, ended = self.owed.setdefault(identity, ([], []))
            request_id, attempt = message.request_id, message.attempt
            ids = (TOKEN,) * (message.sampling.max_tokens or 1)
            items.append(TokenItem(request_id, 0, attempt, 0, ids, "length"))
            ended.append(RequestEnded(request_id, attempt))
        elif isinstance(message, ProbeInstance):
            self.socket.send(identity, ProbeAnswer(message.nonce, True))

    def answer(self) -> None:
        owed, self.owed = self.owed, {}
        for identity, (items, ended) in owed.items():
            self.socket.send(identity, TokenBatch(tuple(items), tuple(ended)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--registry-here", action="store_true")
    parser.add_argument("--model", default="xllm-demo")
    parser.add_argument("--vocab-size", type=int, required=True)
    options = parser.parse_args()

    async def run() -> None:
        await InstantInstance(options).run()

    uvloop.run(run())


if __name__ == "__main__":
    main()
