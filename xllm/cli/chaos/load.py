"""Streams kept open against a cluster, over ZeroMQ and HTTP, each word noted in the ledger.

It decides nothing about faults and judges nothing. Each of its loops asks, reads to the end, and
asks again, until it is told to finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

from xllm.cli.bench.http_stream import CutError, HttpAddress, HttpStreams, RefusedError
from xllm.cli.chaos.asks import Ask, options_of
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.oracle import Streams
from xllm.client.asynchronous import AsyncClient
from xllm.client.open_request import EndMessage
from xllm.client.requests import build_submit
from xllm.errors import XllmError
from xllm.protocol.generation import TokenDelta

ASK_AGAIN_S = 0.2
"""After a refusal or a failure a loop waits so long."""
HTTP_AGAIN_S = 0.05
PATIENCE_S = 20.0
"""Refusals are borne so long."""
REFUSALS = frozenset(("cut", "http_503", "http_429", "unavailable", "overloaded", "broken"))
"""Ends after which another router is asked, as long as no token came."""
REQUEST_S = 120.0
RECALLED = "x-recalled-tokens"
"""The header that says how many tokens of a stream that goes on were not drawn again."""


class _StreamError(Exception):
    """The event that ended a stream in place of its end: the error's code."""


class _Listener:
    """Writes one request's words into the ledger; its end goes to who waits."""

    def __init__(self, ledger: Ledger, key: int) -> None:
        self._ledger = ledger
        self._key = key
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_delta(self, delta: TokenDelta) -> None:
        """Tokens."""
        now = time.monotonic()
        self._ledger.heard(self._key, delta.choice, delta.token_ids, now, delta.attempt)

    def on_end(self, message: EndMessage) -> None:
        """The good end."""
        self._end("")

    def on_error(self, error: XllmError) -> None:
        """The bad end."""
        self._end(error.code)

    def _end(self, code: str) -> None:
        if self.ended.done():
            self._ledger.num_after_end += 1
        else:
            self.ended.set_result(code)


class _Source:
    """A stream over HTTP that was posted again. `drawn_from`: when its answer began, where what
    was there before had to be drawn again."""

    def __init__(self) -> None:
        self.drawn_from: float | None = None

    def began(self, headers: Mapping[str, str]) -> None:
        """Its first token was there. A router of another version says nothing of tokens."""
        if headers.get(RECALLED, "0") == "0":
            self.drawn_from = time.monotonic()


class StreamLoad:
    """`num_loops` requests at a time, at the HTTP address that all routers share and the ZeroMQ
    address of each. `expect` gives what a request's choices will be: token ids
    for ZeroMQ, `text_of` makes of them what HTTP says."""

    def __init__(
        self,
        ledger: Ledger,
        http: str,
        zmq: list[str],
        asks: Iterator[Ask],
        expect: Callable[[Ask], Streams],
        text_of: Callable[[tuple[int, ...]], str],
        model: str,
    ) -> None:
        self.ledger = ledger
        self.num_refused = 0
        """Refusals that were borne."""
        self._asks = asks
        self._expect = expect
        self._text_of = text_of
        self.model = model
        self._clients = [
            AsyncClient([*zmq[at:], *zmq[:at]], timeout_s=REQUEST_S) for at in range(len(zmq))
        ]
        self.probes = [AsyncClient(one, timeout_s=REQUEST_S, discover=False) for one in zmq]
        """One a router, which speaks with that one only."""
        self._http = HttpStreams(HttpAddress.parse(http))
        self._loops: list[asyncio.Task[None]] = []
        self._finishing = False
        self._may_ask = asyncio.Event()
        self._may_ask.set()

    def begin(self, num_loops: int) -> None:
        """Start asking."""
        self._loops = [asyncio.create_task(self._ask_on(at)) for at in range(num_loops)]

    def rest(self) -> None:
        """Ask nothing more for now; what is open ends."""
        self._may_ask.clear()

    def go_on(self) -> None:
        """Ask again."""
        self._may_ask.set()

    def stop_asking(self) -> None:
        """No further requests; refusals are borne no longer."""
        self._finishing = True
        self._may_ask.set()

    async def finish(self, seconds: float) -> int:
        """Let what is open end; returns how many requests had no end after so long."""
        self.stop_asking()
        _, late = await asyncio.wait(self._loops, timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        return len(self.ledger.open)

    async def close(self) -> None:
        """Give up what is open and close the connections."""
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for client in (*self._clients, *self.probes):
            await client.aclose()
        self._http.close()

    def raise_broken(self) -> None:
        """Raises what ended a loop that should run on."""
        for task in self._loops:
            if task.done() and not task.cancelled():
                task.result()

    async def _ask_on(self, at: int) -> None:
        turn = at
        while True:
            await self._may_ask.wait()
            if self._finishing:
                return
            ask = next(self._asks)
            streams = self._expect(ask)
            if ask.over == "http":
                code, turn = await self._over_http(ask, streams, turn)
            else:
                key = self.ledger.opened("zmq", streams, time.monotonic())
                code, turn = await self._until_taken(key, turn, functools.partial(self._ask, ask))
            if code:
                await asyncio.sleep(ASK_AGAIN_S)

    async def _until_taken(
        self, key: int, turn: int, ask: Callable[[int, int], Awaitable[str]]
    ) -> tuple[str, int]:
        """Ask one router after the other until one takes the request, and note its end. A refusal
        before the first token is no failure: the next router is asked, for a while."""
        end = time.monotonic() + PATIENCE_S
        while True:
            code = await ask(key, turn)
            now = time.monotonic()
            if not code:
                self.ledger.finished(key, now)
                return code, turn
            turn += 1
            if self._finishing:
                end = now
            if code not in REFUSALS or self.ledger.open[key].heard_at or now >= end:
                self.ledger.failed(key, code, now)
                return code, turn
            self.num_refused += 1
            await asyncio.sleep(ASK_AGAIN_S)

    async def _ask(self, ask: Ask, key: int, turn: int) -> str:
        connection = self._clients[turn % len(self._clients)].connection
        message = build_submit(
            connection.next_id(),
            {**options_of(ask), "hold_ms": ask.hold_ms},
            timeout_s=REQUEST_S,
            stream=True,
            prompt=ask.prompt_ids,
        )
        listener = _Listener(self.ledger, key)
        try:
            connection.ask(message, listener, REQUEST_S)
        except XllmError as error:
            listener.on_error(error)
        try:
            return await listener.ended
        finally:
            connection.drop(message.id)

    async def _over_http(self, ask: Ask, streams: Streams, turn: int) -> tuple[str, int]:
        sampling = ask.sampling
        body = {
            "model": self.model, "prompt": list(ask.prompt_ids), "stream": True,
            "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "seed": sampling.seed, "ignore_eos": True,
        }  # fmt: skip
        texts = tuple(self._text_of(ids) for ids in streams)
        key = self.ledger.opened("http", texts, time.monotonic())
        reading = functools.partial(self._read_http, json.dumps(body).encode())
        return await self._until_taken(key, turn, reading)

    async def _read_http(self, body: bytes, key: int, turn: int) -> str:
        """One stream; where it is cut and its events have ids, it goes on at the next router."""
        last_id = ""
        end = time.monotonic() + PATIENCE_S
        for attempt in itertools.count():
            code = "cut"
            source = _Source()
            try:
                async with asyncio.timeout(REQUEST_S):
                    head = source.began if last_id else None
                    events = self._http.post_stream("/completions", body, last_id, head)
                    async with contextlib.aclosing(events):
                        async for event in events:
                            last_id = event.id or last_id
                            if self._take_event(event.data, key, attempt, source.drawn_from):
                                return ""
            except (CutError, OSError):
                pass  # gone on with below
            except TimeoutError:
                return "late"
            except RefusedError as error:
                code = f"http_{error.status}"
            except _StreamError as error:
                return str(error)
            if not last_id or time.monotonic() > end or code not in REFUSALS:
                return code
            await asyncio.sleep(HTTP_AGAIN_S)
        raise AssertionError  # count() has no end

    def _take_event(self, data: bytes, key: int, attempt: int, drawn_from: float | None) -> bool:
        """Whether it was the last one. `drawn_from`: see Ledger.heard."""
        if data == b"[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            raise _StreamError(str(event["error"].get("code")))
        for choice in event["choices"]:
            if text := choice["text"]:
                now = time.monotonic()
                self.ledger.heard(key, choice["index"], text, now, attempt, drawn_from)
        return False
