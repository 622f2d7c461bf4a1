"""The client for programs without a loop: AsyncClient on a private thread.

Any thread may call it, also several at once: each call runs on the private loop and its result
comes back. Tokens cross in a SimpleQueue, without a task or future each.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from xllm.client.answers import StreamItem
from xllm.client.asynchronous import DEFAULT_ENDPOINT, DEFAULT_TIMEOUT_S, AsyncClient
from xllm.client.connection import DEFAULT_MAX_REQUEST_BYTES, DEFAULT_SILENCE_S
from xllm.client.embedding import Inputs
from xllm.client.requests import Messages, Prompt
from xllm.client.results import Completion, Embeddings, StreamDelta
from xllm.client.stream import TokenStream
from xllm.errors import ClosedError
from xllm.protocol.questions import HealthReport, ModelInfo, ProcessStatus

T = TypeVar("T")


class Client:
    """Speaks with an xLLM service over ZeroMQ; `with` closes it. Thread-safe.

    Calls, options, timeouts and errors are AsyncClient's."""

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
        self._client = AsyncClient(
            endpoint,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            silence_s=silence_s,
            keys_dir=keys_dir,
            server_key=server_key,
            max_request_bytes=max_request_bytes,
            discover=discover,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="xllm-client", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """The router spoken with at present, or to be tried first."""
        return self._client.endpoint

    @property
    def left(self) -> tuple[str, ...]:
        """Why each router but that one was last turned away from, if it was: a line each."""
        return self._client.left

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Completion:
        """Complete a text or token ids."""
        return self._call(self._client.generate(prompt, timeout_s=timeout_s, **options))

    def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Any
    ) -> Completion:
        """Answer a conversation."""
        return self._call(self._client.chat(messages, timeout_s=timeout_s, **options))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> SyncStream:
        """The answer as it comes: iterate over it. Leaving the loop early aborts it."""
        opened: list[TokenStream] = []

        async def start() -> TokenStream:
            client = self._client
            opened.append(client.stream(prompt, messages=messages, timeout_s=timeout_s, **options))
            return opened[0]

        try:
            return SyncStream(self, self._call(start()))
        except BaseException:
            # A Ctrl-C may come when the request is out and nobody holds its stream yet.
            self.call_soon(lambda: _drop_all(opened))
            raise

    def embed(
        self,
        inputs: Inputs,
        *,
        dimensions: int = 0,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Embeddings:
        """The vectors of a text, of token ids, or of a list of either."""
        return self._call(
            self._client.embed(inputs, dimensions=dimensions, timeout_s=timeout_s, **options)
        )

    def models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """The models served."""
        return self._call(self._client.models(timeout_s=timeout_s))

    def health(self, *, probe: bool = False, timeout_s: float | None = None) -> HealthReport:
        """How the service is; `probe` sends a token through the data path first."""
        return self._call(self._client.health(probe=probe, timeout_s=timeout_s))

    def status(self, *, timeout_s: float | None = None) -> tuple[ProcessStatus, ...]:
        """The processes of the cluster as the router sees them."""
        return self._call(self._client.status(timeout_s=timeout_s))

    def sleep(
        self,
        model: str,
        *,
        end_s: float = 0.0,
        drop_weights: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Put a model to sleep; see AsyncClient."""
        self._call(
            self._client.sleep(model, end_s=end_s, drop_weights=drop_weights, timeout_s=timeout_s)
        )

    def wake(self, model: str, *, timeout_s: float | None = None) -> None:
        """Wake a model; returns once it takes requests."""
        self._call(self._client.wake(model, timeout_s=timeout_s))

    def assign_role(self, instance: str, role: str, *, timeout_s: float | None = None) -> None:
        """Say what an instance is for; see AsyncClient."""
        self._call(self._client.assign_role(instance, role, timeout_s=timeout_s))

    def set_objectives(
        self,
        *,
        ttft_ms: int | None = None,
        tpot_ms: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Set the objectives of requests that name none; see AsyncClient."""
        return self._call(
            self._client.set_objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms, timeout_s=timeout_s)
        )

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        add_special_tokens: bool = True,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text, or of a conversation through the chat template."""
        return self._call(
            self._client.tokenize(
                text,
                messages=messages,
                model=model,
                add_special_tokens=add_special_tokens,
                timeout_s=timeout_s,
            )
        )

    def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        return self._call(self._client.detokenize(token_ids, model=model, timeout_s=timeout_s))

    def close(self) -> None:
        """Close the connection and end the thread; calls that wait elsewhere get ClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def call_soon(self, callback: Callable[[], None]) -> bool:
        """Run a callback on the private loop; False, and nothing, once the client is closed."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(callback)
            return not self._closed

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                work.close()
                raise ClosedError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut_down(self) -> None:
        await self._client.aclose()
        own = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not own]
        await asyncio.gather(*others, return_exceptions=True)


class SyncStream:
    """One streamed answer. Iterating gives its StreamDeltas, once, in one thread; `completion` is
    there after the last. `with` (or `close`) stops it for sure."""

    def __init__(self, client: Client, stream: TokenStream) -> None:
        self._client = client
        self._stream = stream
        self._queue: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
        if not client.call_soon(lambda: stream.forward(self._queue.put)):
            self._queue.put(ClosedError("this client is closed"))

    @property
    def completion(self) -> Completion | None:
        """The whole answer with usage and timing, once it ended well; None before."""
        return self._stream.completion

    def __iter__(self) -> Iterator[StreamDelta]:
        return self._pass()

    def abort(self) -> None:
        """Ask the service to stop; the stream goes on to its end, with reason `abort`."""
        self._client.call_soon(self._stream.abort)

    def close(self) -> None:
        """Stop the request and hear nothing more of it."""
        self._client.call_soon(self._stream.drop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _pass(self) -> Iterator[StreamDelta]:
        try:
            while True:
                item = self._queue.get()
                if isinstance(item, StreamDelta):
                    yield item
                    continue
                self._queue.put(item)  # the end stays for a further pass
                if item is not None:
                    raise item
                return
        finally:
            self.close()


def _drop_all(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.drop()
