"""A router service without a cluster: it answers at once, or when a test says so."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from array import array

from prometheus_client import CollectorRegistry, generate_latest

from xllm.errors import InvalidRequestError, ModelNotFoundError
from xllm.protocol.generation import (
    ChoiceResult,
    RequestFailed,
    RequestFinished,
    SubmitRequest,
    TokenDelta,
    Usage,
)
from xllm.protocol.questions import (
    DetokenizedText,
    DetokenizeIds,
    HealthReport,
    ModelInfo,
    ProcessStatus,
    StatusReport,
    TokenizedText,
    TokenizeText,
)
from xllm.protocol.sampling import TokenLogprobs
from xllm.router.front import Sink, Tenant
from xllm.router.service import RouterService

MODEL = "fake"
WORDS = [" zero", " one", " two", " three", " four", " five", " six", " seven"]


@dataclasses.dataclass
class OpenRequest:
    """A request that a held service has not answered."""

    request: SubmitRequest
    tenant: Tenant
    sink: Sink


class FakeLimits:
    """Of every tenant; 0: none."""

    def __init__(self) -> None:
        self.most_open = 0
        self.most_a_minute = 0

    def window(self, account: str, num_requests: int, most: int) -> int:
        if 0 < self.most_a_minute < num_requests:
            raise InvalidRequestError("too many for a minute")
        return min(most, self.most_open or most)


class FakeService(RouterService):
    """Says " zero one two ..." for any prompt; token i of choice c is (i + c) mod 8.

    `held`: requests wait in `open` until the test answers them. `failure`: every request fails
    so. `num_tokens` is the length where a request has no max_tokens."""

    def __init__(self, *, held: bool = False, num_tokens: int = 5) -> None:
        self.registry = CollectorRegistry()
        self.event_keys = (b"k" * 32,)
        self.held = held
        self.num_tokens = num_tokens
        self.failure: RequestFailed | None = None
        self.ready = True
        self.open: dict[str, OpenRequest] = {}
        self.submitted: list[tuple[SubmitRequest, Tenant]] = []
        self.aborted: list[str] = []
        self.num_probes = 0
        self.admission = FakeLimits()
        self._numbers = itertools.count(1)

    def submit(
        self,
        request: SubmitRequest,
        tenant: Tenant,
        sink: Sink,
        borders: tuple[int, ...] = (),
        recall=None,
    ) -> str:
        request_id = f"{next(self._numbers):032x}"
        self.submitted.append((request, tenant))
        self.open[request_id] = OpenRequest(request, tenant, sink)
        if request.model not in ("", MODEL):
            self.fail(request_id, "model_not_found", "no such model", "model")
        elif request.sampling.temperature < 0:
            self.fail(request_id, "invalid_value", "temperature must be >= 0", "temperature")
        elif self.failure is not None:
            failure = self.failure
            self.fail(
                request_id,
                failure.code,
                failure.message,
                failure.param,
                retry_after_ms=failure.retry_after_ms,
            )
        elif not self.held:
            asyncio.get_running_loop().call_soon(self.answer, request_id)
        return request_id

    def tokens_of(self, request: SubmitRequest, choice: int) -> list[int]:
        limit = request.sampling.max_tokens
        num = self.num_tokens if limit is None else limit
        return [(index + choice) % len(WORDS) for index in range(num)]

    def answer(self, request_id: str) -> None:
        """All tokens of a request, one delta each where it streams, and its end."""
        if request_id not in self.open:
            return
        request = self.open[request_id].request
        for choice in range(request.sampling.n):
            tokens = self.tokens_of(request, choice)
            if request.stream:
                for index in range(len(tokens)):
                    self.delta(request_id, choice, index, last=index == len(tokens) - 1)
        self.finish(request_id)

    def delta(self, request_id: str, choice: int, index: int, *, last: bool = False) -> None:
        """One token."""
        one = self.open[request_id]
        token = (index + choice) % len(WORDS)
        one.sink.send(
            TokenDelta(
                id=one.request.id,
                choice=choice,
                first_index=index,
                token_ids=(token,),
                text=WORDS[token],
                logprobs=self.logprobs([token]) if self.wants_logprobs(one.request) else None,
                finish_reason="length" if last else "",
            )
        )

    def finish(self, request_id: str) -> None:
        """The end of a request."""
        one = self.open.pop(request_id)
        request = one.request
        if request.embed:
            self.embed(request_id, request, one.sink)
            return
        choices = []
        for index in range(request.sampling.n):
            tokens = self.tokens_of(request, index)
            choices.append(
                ChoiceResult(
                    index=index,
                    finish_reason="length",
                    text="" if request.stream else "".join(WORDS[token] for token in tokens),
                    token_ids=tuple(tokens),
                    logprobs=self.logprobs(tokens) if self.wants_logprobs(request) else None,
                )
            )
        prompt = request.prompt if isinstance(request.prompt, tuple) else (0, 1, 2)
        prompt_logprobs = None
        if request.sampling.prompt_logprobs is not None:
            prompt_logprobs = (None, *self.logprobs(list(prompt[1:])))
        one.sink.send(
            RequestFinished(
                id=request.id,
                request_id=request_id,
                choices=tuple(choices),
                usage=Usage(
                    prompt_tokens=len(prompt),
                    completion_tokens=sum(len(choice.token_ids) for choice in choices),
                    cached_tokens=1,
                ),
                prompt_logprobs=prompt_logprobs,
            )
        )

    def embed(self, request_id: str, request: SubmitRequest, sink: Sink) -> None:
        """The vector of a request: how long its prompt is, and its index."""
        prompt = request.prompt
        assert prompt is not None
        numbers = array("f", [len(prompt), request.id, 0.1])[: request.dimensions or 3]
        sink.send(
            RequestFinished(
                id=request.id,
                request_id=request_id,
                choices=(),
                usage=Usage(prompt_tokens=len(prompt), completion_tokens=0, cached_tokens=1),
                embedding=numbers.tobytes(),
            )
        )

    def fail(
        self,
        request_id: str,
        code: str,
        message: str,
        param: str | None = None,
        *,
        retry_after_ms: int = 0,
    ) -> None:
        """A failed end of a request."""
        one = self.open.pop(request_id)
        one.sink.send(
            RequestFailed(
                id=one.request.id,
                code=code,
                message=message,
                request_id=request_id,
                param=param,
                retry_after_ms=retry_after_ms,
            )
        )

    def wants_logprobs(self, request: SubmitRequest) -> bool:
        return request.sampling.logprobs is not None

    def logprobs(self, tokens: list[int]) -> tuple[TokenLogprobs, ...]:
        return tuple(
            TokenLogprobs(
                token_id=token,
                logprob=-0.5,
                rank=1,
                top_ids=(token, (token + 1) % 8),
                top_logprobs=(-0.5, -1.5),
            )
            for token in tokens
        )

    def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.aborted.append(request_id)
            self.fail(request_id, "aborted", "the client went away")

    @property
    def texts(self) -> FakeService:
        return self

    def models(self) -> tuple[ModelInfo, ...]:
        return (ModelInfo(name=MODEL, max_model_len=1000, vocab_size=8),)

    async def encode(self, request: TokenizeText, tenant: Tenant) -> TokenizedText:
        if request.model not in ("", MODEL):
            raise ModelNotFoundError("no such model", param="model")
        words = (request.text or "").split()
        ids = tuple(WORDS.index(" " + word) for word in words)
        return TokenizedText(id=request.id, token_ids=ids, max_model_len=1000)

    tokenize = encode

    async def decode(self, request: DetokenizeIds, tenant: Tenant) -> DetokenizedText:
        if any(not 0 <= token < len(WORDS) for token in request.token_ids):
            raise InvalidRequestError("token_ids must be from 0 to 7", param="token_ids")
        return DetokenizedText(id=0, text="".join(WORDS[token] for token in request.token_ids))

    detokenize = decode

    def token_bytes(self, model: str, token_id: int) -> bytes:
        return WORDS[token_id].encode()

    async def health(self, probe: bool) -> HealthReport:
        self.num_probes += 1
        await asyncio.sleep(0)
        return HealthReport(id=0, live=True, ready=self.ready, version="0")

    def status(self) -> StatusReport:
        return StatusReport(id=0, processes=(ProcessStatus(name="fake", kind="router"),))

    def metrics_text(self) -> bytes:
        return generate_latest(self.registry)

    @property
    def num_open(self) -> int:
        return len(self.open)
