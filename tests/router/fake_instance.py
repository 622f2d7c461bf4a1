"""A master that only pretends: registers, beats, and says tokens as its script tells it."""

from __future__ import annotations

import asyncio

from xllm.errors import BrokenError
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import (
    AdmitRequest,
    CancelRequest,
    FrameRefused,
    HeldTokens,
    InstancePong,
    InstanceRequest,
    PingInstance,
    ProbeAnswer,
    ProbeInstance,
    QueryTokens,
    RequestEnded,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.records import InstanceRecord, instance_key
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket

MODEL = "m"
HEARTBEAT_S = 0.05


def drawn(index: int) -> int:
    """The id of every stream's token at that index: printable single bytes."""
    return 3 + index % 60


class FakeInstance:
    """`tokens_at_once`: how many a request gets right after its admission (None: all).
    `answers_pings`: else it is of a version that knows none; `beats`: it says that it is there;
    `held`: by request, tokens of its choices; None: it is of a version that knows no such thing."""

    def __init__(
        self,
        transport,
        registry,
        run_dir,
        name,
        tokens_at_once=None,
        answers_pings=True,
        beats=True,
    ) -> None:
        self.name = name
        self.tokens_at_once = tokens_at_once
        self.admits: list[AdmitRequest] = []
        self.cancels: list[CancelRequest] = []
        self.routers: dict[str, bytes] = {}
        self.state = "ready"
        self.held: dict[str, tuple[tuple[int, ...], ...]] | None = {}
        self.num_asked = 0
        """How often it was asked for what it holds."""
        self.answers_probes = True
        self.answers_pings = answers_pings
        self.is_deaf = False
        """It speaks, and does not hear."""
        self.deaf_to: frozenset[bytes] = frozenset()
        """Connections that carry words one way only."""
        self.num_pings = 0
        self._registry = registry
        self._socket = RouterSocket(
            transport, f"ipc://{run_dir}/{name}", Decoder(InstanceRequest), self._on_message
        )
        self._bus = PublisherSocket(transport, f"ipc://{run_dir}/{name}-bus")
        self._seq = 0
        self.beats = beats
        self._beating = asyncio.ensure_future(self._beat())

    async def register(self) -> None:
        record = InstanceRecord(
            name=self.name,
            incarnation=self.name,
            endpoint=self._socket.endpoint,
            bus_endpoint=self._bus.endpoint,
            model=MODEL,
            model_path="",
            max_model_len=256,
            vocab_size=330,
            block_size=4,
            num_blocks=64,
        )
        await self._registry.put(instance_key("default", self.name), encode(record))

    async def deregister(self) -> None:
        await self._registry.delete(instance_key("default", self.name))

    def close(self) -> None:
        self._beating.cancel()
        self._socket.close()
        self._bus.close()

    @property
    def peers(self) -> frozenset[bytes]:
        """Connections that it hears, or did."""
        return self._socket.peers

    def finish(self, request: AdmitRequest) -> None:
        """Say the rest of a request."""
        self._say(request, request.sampling.max_tokens)

    async def _beat(self) -> None:
        while True:
            if not self.beats:
                await asyncio.sleep(HEARTBEAT_S)
                continue
            self._seq += 1
            load = InstanceLoad(num_running=len(self.admits))
            self._bus.publish(
                b"instance",
                InstanceHeartbeat(self.name, self.name, self._seq, self.state, load=load),
            )
            await asyncio.sleep(HEARTBEAT_S)

    def _on_message(self, identity, message, frames) -> None:
        if self.is_deaf or identity in self.deaf_to:
            return
        if isinstance(message, PingInstance):
            self.num_pings += 1
            answer = InstancePong(message.number) if self.answers_pings else FrameRefused("what?")
            self._socket.send(identity, answer)
        elif isinstance(message, QueryTokens):
            self.num_asked += 1
            held = None if self.held is None else self.held.get(message.request_id, ())
            answer = FrameRefused("what?") if held is None else HeldTokens(message.number, held)
            self._socket.send(identity, answer)
        elif isinstance(message, AdmitRequest):
            self.admits.append(message)
            self.routers[message.request_id] = identity
            if self.tokens_at_once is None:
                self.finish(message)
            else:
                have = len(message.outputs[0]) if message.outputs else 0
                self._say(message, have + self.tokens_at_once)
        elif isinstance(message, CancelRequest):
            self.cancels.append(message)
        elif isinstance(message, ProbeInstance) and self.answers_probes:
            self._socket.send(identity, ProbeAnswer(message.nonce, True))

    def _say(self, request: AdmitRequest, upto: int) -> None:
        key = f"said {request.request_id} {request.attempt}"
        have = getattr(self, key, len(request.outputs[0]) if request.outputs else 0)
        setattr(self, key, upto)
        last = upto >= request.sampling.max_tokens
        item = TokenItem(
            request.request_id,
            0,
            request.attempt,
            have,
            tuple(map(drawn, range(have, upto))),
            "length" if last else "",
        )
        ended = (RequestEnded(request.request_id, request.attempt),) if last else ()
        try:
            self._socket.send(self.routers[request.request_id], TokenBatch((item,), ended))
        except BrokenError:
            pass  # the router left
