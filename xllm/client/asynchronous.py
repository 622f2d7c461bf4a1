"""The client for programs with a running asyncio loop.

A thin shell: it builds requests, waits for answers and turns them into typed results. It belongs
to the loop in which it is first used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from xllm.client.answers import AnswerWaiter, StreamBuffer
from xllm.client.connection import (
    DEFAULT_MAX_REQUEST_BYTES,
    DEFAULT_SILENCE_S,
    ClientConnection,
)
from xllm.client.embedding import Inputs, embed_all, split_inputs
from xllm.client.open_request import EndMessage
from xllm.client.requests import (
    Messages,
    Prompt,
    build_detokenize,
    build_embed,
    build_submit,
    build_tokenize,
)
from xllm.client.results import AnswerBuilder, Completion, Embeddings
from xllm.client.stream import TokenStream
from xllm.errors import BadMessageError, ClosedError, InvalidRequestError
from xllm.protocol.administration import (
    ModelSleepSet,
    ObjectivesSet,
    RoleSet,
    SetModelSleep,
    SetObjectives,
    SetRole,
)
from xllm.protocol.client import ClientMessage
from xllm.protocol.generation import RequestFinished
from xllm.protocol.questions import (
    DetokenizedText,
    HealthReport,
    ListModels,
    ModelInfo,
    ModelList,
    ProcessStatus,
    QueryHealth,
    QueryStatus,
    StatusReport,
    TokenizedText,
)
from xllm.protocol.transport.endpoint import check_service_endpoint

DEFAULT_ENDPOINT = "tcp://127.0.0.1:8011"
DEFAULT_TIMEOUT_S = 600.0
MIN_WAIT_S = 0.001

M = TypeVar("M")


class AsyncClient:
    """Speaks with an xLLM service over ZeroMQ; `async with` closes it.

    Every call takes `timeout_s` (default: the client's): DeadlineError when it passes, and the
    request is aborted at the service. A router of `endpoint` (one address or several) that is lost,
    stops or says nothing for `silence_s` costs nothing: what is open goes on at another one, of
    those given and (unless `discover` is off) of those that it named (docs/failover.md).
    BrokenError: none of them answers within `connect_timeout_s`.
    PayloadTooLargeError, before anything is sent: a request has more than `max_request_bytes`.
    What the service refuses or fails raises the class of `xllm.errors` that its code names."""

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = 5.0,
        silence_s: float = DEFAULT_SILENCE_S,
        keys_dir: str = "",
        server_key: str = "",
        max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
        discover: bool = True,
    ) -> None:
        self._endpoints = check_endpoints(endpoint)
        self._timeout_s = check_timeout(timeout_s)
        self._connect_timeout_s = check_timeout(connect_timeout_s)
        self._silence_s = check_timeout(silence_s)
        self._discover = discover
        self._keys_dir = keys_dir
        self._server_key = server_key
        self._max_request_bytes = max_request_bytes
        self._connection: ClientConnection | None = None
        self._closed = False

    @property
    def connection(self) -> ClientConnection:
        """The low-level interface; made at first use, inside the running loop."""
        if self._closed:
            raise ClosedError("this client is closed")
        if self._connection is None:
            self._connection = ClientConnection(
                self._endpoints,
                connect_timeout_s=self._connect_timeout_s,
                silence_s=self._silence_s,
                keys_dir=self._keys_dir,
                server_key=self._server_key,
                max_request_bytes=self._max_request_bytes,
                discover=self._discover,
            )
        return self._connection

    @property
    def endpoint(self) -> str:
        """The router spoken with at present, or to be tried first."""
        return self._endpoints[0] if self._connection is None else self._connection.endpoint

    @property
    def left(self) -> tuple[str, ...]:
        """Why each router but that one was last turned away from, if it was: a line each."""
        return () if self._connection is None else self._connection.left

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Completion:
        """Complete a text or token ids. Options: `model`, `priority`, `offline`, `cache_salt` and
        the fields of SamplingParams (`max_tokens`, `temperature`, `seed`, `n`, `stop`, ...)."""
        return await self._complete(timeout_s, options, prompt=prompt)

    async def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> Completion:
        """Answer a conversation: mappings with `role` and `content`. Options as in `generate`."""
        return await self._complete(timeout_s, options, messages=messages)

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> TokenStream:
        """The answer to a prompt or conversation as it comes. The request starts here; leaving
        the loop over it early, closing or dropping the stream aborts it."""
        wait_s = self._resolve_timeout(timeout_s)
        connection = self.connection
        request_id = connection.next_id()
        message = build_submit(
            request_id, options, timeout_s=wait_s, stream=True, prompt=prompt, messages=messages
        )
        buffer = StreamBuffer(asyncio.get_running_loop())
        connection.ask(message, buffer, wait_s)
        return TokenStream(connection, request_id, buffer)

    async def embed(
        self,
        inputs: Inputs,
        *,
        dimensions: int = 0,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Embeddings:
        """The vectors of a text, of token ids, or of a list of either, in its order. `dimensions`:
        the first so many numbers only, made to length one again. Options: `model`, `priority`,
        `offline`, `cache_salt`, `ttft_ms`. An error of one input names its index."""
        wait_s = self._resolve_timeout(timeout_s)
        end = time.monotonic() + wait_s

        async def ask(prompt: Prompt) -> RequestFinished:
            left_s = max(end - time.monotonic(), MIN_WAIT_S)
            message = build_embed(
                self.connection.next_id(), options, left_s, prompt=prompt, dimensions=dimensions
            )
            return await self._ask(message, RequestFinished, left_s)

        return await embed_all(split_inputs(inputs), ask)

    async def models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """The models served."""
        question = ListModels(id=self.connection.next_id())
        return (await self._ask(question, ModelList, timeout_s)).models

    async def health(self, *, probe: bool = False, timeout_s: float | None = None) -> HealthReport:
        """How the service is; `probe` sends a token through the data path first."""
        question = QueryHealth(id=self.connection.next_id(), probe=probe)
        return await self._ask(question, HealthReport, timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> tuple[ProcessStatus, ...]:
        """The processes of the cluster as the router sees them."""
        question = QueryStatus(id=self.connection.next_id())
        return (await self._ask(question, StatusReport, timeout_s)).processes

    async def sleep(
        self,
        model: str,
        *,
        end_s: float = 0.0,
        drop_weights: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Put a model to sleep: its memory for KV is the others', or the machine's. What it runs
        has `end_s` to end. `drop_weights`: give these back, too; waking reads them again."""
        question = SetModelSleep(
            id=self.connection.next_id(),
            model=model,
            asleep=True,
            timeout_ms=int(end_s * 1000),
            drop_weights=drop_weights,
        )
        await self._ask(question, ModelSleepSet, timeout_s)

    async def wake(self, model: str, *, timeout_s: float | None = None) -> None:
        """Wake a model; returns once it takes requests."""
        question = SetModelSleep(id=self.connection.next_id(), model=model, asleep=False)
        await self._ask(question, ModelSleepSet, timeout_s)

    async def assign_role(
        self, instance: str, role: str, *, timeout_s: float | None = None
    ) -> None:
        """Say what an instance is for: both, prefill or decode. The router must be the leader."""
        question = SetRole(id=self.connection.next_id(), instance=instance, role=role)
        await self._ask(question, RoleSet, timeout_s)

    async def set_objectives(
        self,
        *,
        ttft_ms: int | None = None,
        tpot_ms: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Set the objectives of requests that name none; 0: each instance's own again, None: as it
        is. Returns both as they are then. The router must be the leader."""
        question = SetObjectives(id=self.connection.next_id(), ttft_ms=ttft_ms, tpot_ms=tpot_ms)
        answer = await self._ask(question, ObjectivesSet, timeout_s)
        return answer.ttft_ms, answer.tpot_ms

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation through the chat template."""
        question = build_tokenize(
            self.connection.next_id(),
            model,
            text=text,
            messages=messages,
            add_special_tokens=add_special_tokens,
        )
        return (await self._ask(question, TokenizedText, timeout_s)).token_ids

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        question = build_detokenize(self.connection.next_id(), model, token_ids)
        return (await self._ask(question, DetokenizedText, timeout_s)).text

    async def aclose(self) -> None:
        """Close the connection; what is open ends with ClosedError."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _complete(
        self,
        timeout_s: float | None,
        options: dict[str, Any],
        *,
        prompt: Prompt | None = None,
        messages: Messages | None = None,
    ) -> Completion:
        wait_s = self._resolve_timeout(timeout_s)
        message = build_submit(
            self.connection.next_id(),
            options,
            timeout_s=wait_s,
            stream=False,
            prompt=prompt,
            messages=messages,
        )
        builder = AnswerBuilder(time.monotonic())
        end = await self._ask(message, RequestFinished, wait_s)
        return builder.finish(end, time.monotonic())

    async def _ask(self, message: ClientMessage, answer: type[M], timeout_s: float | None) -> M:
        connection = self.connection
        waiter = AnswerWaiter(asyncio.get_running_loop())
        connection.ask(message, waiter, self._resolve_timeout(timeout_s))
        try:
            end: EndMessage = await waiter.wait_end()
        finally:
            connection.drop(message.id)
        if not isinstance(end, answer):
            raise BadMessageError(f"the router answered {type(end).__name__} to this question")
        return end

    def _resolve_timeout(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else check_timeout(timeout_s)


def check_endpoints(endpoint: str | Sequence[str]) -> tuple[str, ...]:
    """One address or several; InvalidRequestError where it is neither, ConfigError where one
    cannot be a service's."""
    if isinstance(endpoint, str):
        several: tuple[str, ...] = (endpoint,)
    else:
        several = tuple(endpoint) if isinstance(endpoint, Sequence) else ()
    if not several or not all(isinstance(one, str) for one in several):
        raise InvalidRequestError("endpoint must be an address, or several", param="endpoint")
    for one in several:
        check_service_endpoint(one, "endpoint")
    return several


def check_timeout(timeout_s: float) -> float:
    """The timeout, or InvalidRequestError where it is no positive number of seconds."""
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < 10_000_000:
        raise InvalidRequestError(
            "timeout_s must be a number of seconds, above 0 and finite", param="timeout_s"
        )
    return float(timeout_s)
