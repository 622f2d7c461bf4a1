"""A router's service with fakes around it: a clock, links to instances, sinks that check."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from tests.router.model_dirs import CHAT_TEMPLATE, byte_level_tokenizer
from xllm.config.admission import AdmissionSettings
from xllm.config.router import RouterSettings
from xllm.config.routing import RoutingSettings
from xllm.config.settings import Settings
from xllm.protocol.bus import InstanceHeartbeat
from xllm.protocol.client import RouterMessage
from xllm.protocol.generation import RequestFailed, RequestFinished, SubmitRequest, TokenDelta
from xllm.protocol.instance import (
    AdmitRequest,
    CancelRequest,
    InstanceRequest,
    PooledVector,
    ProbeAnswer,
    ProbeInstance,
    RequestEnded,
    TokenBatch,
    TokenItem,
)
from xllm.protocol.records import InstanceRecord
from xllm.protocol.sampling import SamplingParams
from xllm.router.front import Tenant
from xllm.router.service import RouterService
from xllm.router.text.model import TextModel
from xllm.router.text.pieces import ByteLevelScheme
from xllm.router.text.template import ChatTemplate

TENANT = Tenant()


def in_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """The test is a coroutine function; it gets a loop and a deadline."""

    @functools.wraps(test)
    def wrapped(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 20))

    return wrapped


CONTEXT = 512
WIDTH = 4
"""Numbers of a vector, where the fake instances embed."""


@functools.cache
def text_model() -> TextModel:
    template = ChatTemplate(CHAT_TEMPLATE, {"eos_token": "<|end|>"})
    return TextModel(byte_level_tokenizer(), ByteLevelScheme(), template)


class FakeClock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeLinks:
    """Remembers what was sent to instances; `answer_probes` plays healthy workers."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.unreachable: set[str] = set()
        self.service: RouterService | None = None
        self.answer_probes = True

    def send(self, instance: str, message: InstanceRequest) -> bool:
        if instance in self.unreachable:
            return False
        self.sent.append((instance, message))
        if isinstance(message, ProbeInstance) and self.answer_probes and self.service:
            answer = ProbeAnswer(message.nonce, True)
            loop = asyncio.get_running_loop()
            loop.call_soon(self.service.prober.answered, instance, answer)
        return True

    def admits(self) -> list[AdmitRequest]:
        return [word for _, word in self.sent if isinstance(word, AdmitRequest)]

    def cancels(self) -> list[CancelRequest]:
        return [word for _, word in self.sent if isinstance(word, CancelRequest)]


class ListSink:
    """Keeps messages; nothing may follow a terminal one."""

    def __init__(self) -> None:
        self.messages: list[RouterMessage] = []
        self.done = asyncio.Event()

    def send(self, message: RouterMessage) -> None:
        assert not self.done.is_set(), f"{message} after the terminal message"
        self.messages.append(message)
        if isinstance(message, RequestFinished | RequestFailed):
            self.done.set()

    @property
    def last(self) -> Any:
        assert self.done.is_set()
        return self.messages[-1]

    @property
    def text(self) -> str:
        return "".join(one.text for one in self.messages if isinstance(one, TokenDelta))


class FakeCluster:
    """A service with `names` as ready instances."""

    def __init__(
        self,
        *names: str,
        clock: Callable[[], float] | None = None,
        admission: AdmissionSettings | None = None,
        task: str = "generate",
        routing: RoutingSettings | None = None,
        **router: Any,
    ) -> None:
        self.task = task
        self.clock = FakeClock()
        self.links = FakeLinks()
        self.settings = Settings(
            router=RouterSettings(**router),
            routing=routing or RoutingSettings(),
            admission=admission or AdmissionSettings(),
        )
        self.service = RouterService(
            self.settings, "m", text_model(), self.links, clock=clock or self.clock
        )
        self.links.service = self.service
        self._seq: dict[str, int] = {}
        for name in names:
            self.join(name)

    def join(self, name: str, incarnation: str = "1") -> None:
        self.register(name, incarnation)
        self.change(self.service.view.connected(name))
        self.beat(name, incarnation)

    def register(self, name: str, incarnation: str = "1") -> None:
        registered = self.service.registered(
            InstanceRecord(
                name=name,
                incarnation=incarnation,
                endpoint="",
                bus_endpoint="",
                model="m",
                model_path="",
                max_model_len=CONTEXT,
                vocab_size=330,
                block_size=4,
                num_blocks=64,
                eos_ids=(0,),
                revision="r1",
                task=self.task,
                embedding_size=WIDTH if self.task == "embed" else 0,
            )
        )
        self.change(registered)

    def tick(self) -> None:
        self.change(self.service.tick())

    def change(self, change: Any) -> None:
        self.service.dispatcher.changed(change)

    def beat(self, name: str, incarnation: str = "1", state: str = "ready", **more: Any) -> None:
        self._seq[name] = self._seq.get(name, 0) + 1
        word = InstanceHeartbeat(name, incarnation, self._seq[name], state, **more)
        self.change(self.service.heard(word))

    def ask(self, prompt: Any = "hello", **more: Any) -> tuple[str, ListSink]:
        sink = ListSink()
        keys = (
            "model",
            "stream",
            "hold_ms",
            "timeout_ms",
            "messages",
            "resume",
            "cache_salt",
            "chat_template_kwargs",
            "priority",
            "traceparent",
            "ttft_ms",
            "tpot_ms",
            "embed",
            "dimensions",
            "session",
            "packed_prompt",
            "offline",
        )
        fields = {key: more.pop(key) for key in keys if key in more}
        if "messages" not in fields:
            fields["prompt"] = prompt
        request = SubmitRequest(id=7, sampling=SamplingParams(**more), **fields)
        return self.service.submit(request, TENANT, sink), sink

    def say(
        self,
        request_id: str,
        first: int,
        text: str,
        reason: str = "",
        attempt: int = 1,
        choice: int = 0,
        stop_id: int = -1,
    ) -> int:
        ids = tuple(text_model().encode(text))
        item = TokenItem(request_id, choice, attempt, first, ids, reason, stop_id)
        self.service.instance_says(self._runs(request_id), TokenBatch((item,)))
        return len(ids)

    def _runs(self, request_id: str) -> str:
        """The instance that runs it."""
        request = self.service.dispatcher.open.get(request_id)
        state = None if request is None else request.state
        return state.instance if state is not None and state.instance else "a"

    def pool(self, request_id: str, vector: bytes, attempt: int = 1) -> None:
        """The vector of a request, and that its one choice has no tokens."""
        item = TokenItem(request_id, 0, attempt, 0, (), "length")
        word = PooledVector(request_id, attempt, vector)
        self.service.instance_says(self._runs(request_id), TokenBatch((item,), vectors=(word,)))

    def end(self, request_id: str, attempt: int = 1, code: str = "", cached: int = 0) -> None:
        ended = RequestEnded(request_id, attempt, code, "as told" if code else "", "", cached)
        self.service.instance_says(self._runs(request_id), TokenBatch((), (ended,)))

    def close(self) -> None:
        self.service.dispatcher.check()
        self.service.view.check()
        self.service.close()
