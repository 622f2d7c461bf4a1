"""A router that only speaks and listens: the master's peer in these tests."""

import asyncio

from tests.master.toy_instance import Stream
from xllm.protocol.bus import InstanceHeartbeat, SnapshotOfBlocks
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import AdmitRequest, InstanceReply, RequestEnded, TokenBatch
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import SubscriberSocket


class FakeRouter:
    """Connects to `endpoint`; keeps streams, ends, other answers, and heartbeats."""

    def __init__(
        self, transport, endpoint: str, bus_endpoint: str = "", model: str = "toy"
    ) -> None:
        self.model = model
        self.streams: dict[tuple[str, int, int], Stream] = {}
        self.ended: dict[tuple[str, int], RequestEnded] = {}
        self.answers: list = []
        self.batches: list[TokenBatch] = []
        self.beats: list[InstanceHeartbeat] = []
        self.socket = DealerSocket(
            transport, endpoint, Decoder(InstanceReply | SnapshotOfBlocks), self._on_message
        )
        self._bus = None
        if bus_endpoint:
            self._bus = SubscriberSocket(
                transport, bus_endpoint, Decoder(InstanceHeartbeat), self._on_beat
            )

    def _on_beat(self, topic: bytes, beat: InstanceHeartbeat) -> None:
        assert topic == b"instance"
        self.beats.append(beat)

    def _on_message(self, message, frames) -> None:
        if not isinstance(message, TokenBatch):
            self.answers.append(message)
            return
        self.batches.append(message)
        for item in message.items:
            key = (item.request_id, item.attempt, item.choice)
            stream = self.streams.setdefault(key, Stream([]))
            assert item.first_index == len(stream.tokens)
            stream.tokens.extend(item.token_ids)
            stream.reason = item.finish_reason
        for ended in message.ended:
            key = (ended.request_id, ended.attempt)
            assert key not in self.ended
            self.ended[key] = ended

    def send(self, message) -> None:
        self.socket.send(message)

    def admit(self, request_id, prompt, attempt=1, **options) -> AdmitRequest:
        timeout_ms, embed = options.pop("timeout_ms", 0), options.pop("embed", False)
        alone = options.pop("alone", False)
        sampling = SamplingParams(**{"max_tokens": 8, "seed": 7, **options})
        request = AdmitRequest(
            request_id,
            attempt,
            self.model,
            tuple(prompt),
            sampling,
            timeout_ms=timeout_ms,
            embed=embed,
            alone=alone,
        )
        self.send(request)
        return request

    async def until(self, condition, timeout_s=10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.001)

    async def ends(self, request_id, attempt=1, timeout_s=10.0) -> RequestEnded:
        await self.until(lambda: (request_id, attempt) in self.ended, timeout_s)
        return self.ended[request_id, attempt]

    async def answer(self, kind, timeout_s=10.0):
        await self.until(lambda: any(isinstance(a, kind) for a in self.answers), timeout_s)
        return next(a for a in self.answers if isinstance(a, kind))

    def close(self) -> None:
        self.socket.close()
        if self._bus is not None:
            self._bus.close()
