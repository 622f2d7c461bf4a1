"""What a load can be put on: any OpenAI-compatible endpoint, or a router's ZeroMQ endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from xllm.cli.bench.http_stream import CutError, HttpAddress, HttpStreams, RefusedError
from xllm.cli.bench.load import LoadError, Piece
from xllm.cli.bench.prompts import PromptMaker
from xllm.cli.bench.shapes import RequestShape
from xllm.client.asynchronous import AsyncClient
from xllm.errors import DependencyError, XllmError

_DONE = b"[DONE]"
_TEXTS = ("content", "reasoning_content", "reasoning")


class OpenAiTarget:
    """`/completions` or `/chat/completions`, streamed. Prompts of a chat are words; those of a
    completion are words, or ids where `maker` has a vocabulary and `use_ids` is set."""

    def __init__(
        self,
        base_url: str,
        *,
        chat: bool,
        model: str,
        maker: PromptMaker,
        use_ids: bool,
        fields: Mapping[str, Any],
        api_key: str,
        timeout_s: float,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._streams = HttpStreams(HttpAddress.parse(base_url), headers)
        self._url = base_url
        self._chat = chat
        self._maker = maker
        self._use_ids = use_ids
        self._fields = dict(fields)
        self._timeout_s = timeout_s
        self.model = model

    async def find_model(self) -> None:
        """Ask which model is served, where none was named. DependencyError where nobody says."""
        if self.model:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                listed = json.loads(await self._streams.get("/models"))
            self.model = str(listed["data"][0]["id"])
        except (OSError, CutError, RefusedError, TimeoutError) as error:
            raise DependencyError(f"{self._url}/models: {_describe(error)}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DependencyError(f"{self._url}/models names no model; --model does") from error

    def prepare(self, index: int, shape: RequestShape) -> bytes:
        """The body."""
        body: dict[str, Any] = {"model": self.model, "stream": True}
        body["stream_options"] = {"include_usage": True}
        body |= {"max_tokens": shape.num_output, **self._fields}
        if self._chat:
            body["messages"] = [{"role": "user", "content": self._maker.text(index, shape)}]
        elif self._use_ids:
            body["prompt"] = self._maker.ids(index, shape)
        else:
            body["prompt"] = self._maker.text(index, shape)
        return json.dumps(body).encode()

    async def send(self, prepared: object) -> AsyncGenerator[Piece, None]:
        """See Target."""
        assert isinstance(prepared, bytes)
        path = "/chat/completions" if self._chat else "/completions"
        finished = False
        try:
            async with contextlib.aclosing(self._streams.post_events(path, prepared)) as events:
                async for data in events:
                    if data == _DONE:
                        finished = True
                        continue
                    event = _decode(data)
                    finished = finished or _is_last(event)
                    for piece in _pieces(event):
                        yield piece
        except RefusedError as error:
            raise LoadError(str(error)) from error
        except CutError as error:
            raise LoadError(f"stream cut: {error}") from error
        except OSError as error:
            raise LoadError(f"no connection: {_describe(error)}") from error
        if not finished:
            raise LoadError("stream cut: the answer ended without its last event")

    async def close(self) -> None:
        """See Target."""
        self._streams.close()


class ZmqTarget:
    """A router's ZeroMQ endpoint, through the client library; prompts are token ids."""

    def __init__(
        self,
        endpoint: str,
        *,
        model: str,
        seed: int,
        sampling: Mapping[str, Any],
        timeout_s: float,
        keys_dir: str = "",
        server_key: str = "",
    ) -> None:
        self._client = AsyncClient(
            endpoint, timeout_s=timeout_s, keys_dir=keys_dir, server_key=server_key
        )
        self._endpoint = endpoint
        self._seed = seed
        self._sampling = dict(sampling)
        self._maker = PromptMaker(seed)
        self.model = model

    async def find_model(self) -> None:
        """Ask for the model and its vocabulary. DependencyError where nobody answers."""
        try:
            served = await self._client.models()
        except XllmError as error:
            raise DependencyError(f"{self._endpoint}: {error.message}") from error
        found = [model for model in served if self.model in ("", model.name)]
        if not found:
            names = ", ".join(model.name for model in served) or "none"
            raise DependencyError(f"{self._endpoint} serves no {self.model!r} (but {names})")
        self.model = found[0].name
        self._maker = PromptMaker(self._seed, found[0].vocab_size)

    def prepare(self, index: int, shape: RequestShape) -> tuple[tuple[int, ...], int]:
        """Prompt and length."""
        return self._maker.ids(index, shape), shape.num_output

    async def send(self, prepared: object) -> AsyncGenerator[Piece, None]:
        """See Target."""
        assert isinstance(prepared, tuple)
        prompt, count = prepared
        try:
            stream = self._client.stream(
                prompt, model=self.model, max_tokens=count, **self._sampling
            )
            async for delta in stream:
                yield Piece(bool(delta.token_ids), len(delta.token_ids))
        except XllmError as error:
            raise LoadError(f"{error.code}: {error.message}") from error
        if (completion := stream.completion) is not None:
            usage = completion.usage
            yield Piece(False, usage=(usage.prompt_tokens, usage.completion_tokens))

    async def close(self) -> None:
        """See Target."""
        await self._client.aclose()


def _decode(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise LoadError(f"no JSON: {data[:200]!r}") from error
    if not isinstance(event, dict):
        raise LoadError(f"no event: {data[:200]!r}")
    if event.get("error"):
        raise LoadError(f"error in the stream: {json.dumps(event['error'])[:300]}")
    return event


def _is_last(event: Mapping[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in event.get("choices") or ())


def _pieces(event: Mapping[str, Any]) -> list[Piece]:
    """An event's choices come before its usage, which stands for the whole answer."""
    found = []
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        texts = [choice.get("text"), *(delta.get(name) for name in _TEXTS)]
        found.append(Piece(any(texts) or bool(delta.get("tool_calls"))))
    usage = event.get("usage")
    if usage and usage.get("completion_tokens") is not None:
        found.append(
            Piece(False, usage=(usage.get("prompt_tokens") or 0, usage["completion_tokens"]))
        )
    return found


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
