"""A router for tests of the client: answers from a script, keeps what it was told."""

from __future__ import annotations

import asyncio
import threading
from array import array

from xllm.protocol.client import BadMessage, ClientMessage
from xllm.protocol.codec import Decoder
from xllm.protocol.generation import (
    AbortRequest,
    ChoiceResult,
    RequestFailed,
    RequestFinished,
    SubmitRequest,
    TokenDelta,
    Usage,
    next_life,
)
from xllm.protocol.questions import (
    DetokenizedText,
    DetokenizeIds,
    HealthReport,
    ListModels,
    ModelInfo,
    ModelList,
    Ping,
    Pong,
    ProcessStatus,
    QueryHealth,
    QueryStatus,
    RouterAddress,
    StatusReport,
    TokenizedText,
    TokenizeText,
)
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket


class FakeRouter:
    """Words of the prompt decide: `echo a b` gives the tokens a, b; `fail CODE` fails;
    `silent` says nothing; `half` sends one delta and no end; `bad` answers bad_message; `part K a
    b` gives as `echo` does, but only the first K to who holds none. `mute`: it hears and says
    nothing; `named`: the routers that its pongs name; `refusal`: the code with which it refuses,
    `refused_model`: that one only, `refuses_for_all`: as any other router would."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:0") -> None:
        self.mute = False
        self.refusal = ""
        self.refused_model = ""
        self.refuses_for_all = False
        self.named: tuple[RouterAddress, ...] = ()
        self.peers: set[bytes] = set()
        self.num_pings = 0
        self.submits: list[SubmitRequest] = []
        self.aborts: list[int] = []
        self._transport = Transport()
        self._socket = RouterSocket(
            self._transport, endpoint, Decoder(ClientMessage), self._receive
        )
        self.endpoint = self._socket.endpoint

    def close(self) -> None:
        self._socket.close()
        self._transport.close()

    def stop(self, *, refuses: bool = False) -> None:
        """Say that it stops, as a router does; and refuse what had just come, if it `refuses`."""
        for identity in self.peers:
            self._socket.send(identity, Pong(id=0, is_stopping=True, routers=self.named))
            for submit in self.submits if refuses else ():
                self._socket.send(
                    identity, RequestFailed(id=submit.id, code="unavailable", message="stops")
                )

    def _receive(self, identity, message, frames) -> None:
        self.peers.add(identity)
        if self.mute:
            return
        for reply in self._replies(message):
            self._socket.send(identity, reply)

    def _replies(self, message):
        match message:
            case SubmitRequest():
                self.submits.append(message)
                if self.refusal and self.refused_model in ("", message.model):
                    return [self._refuse(message)]
                return list(self._answer(message))
            case AbortRequest():
                self.aborts.append(message.id)
                return [RequestFailed(id=message.id, code="aborted", message="aborted")]
            case Ping():
                self.num_pings += 1
                return [Pong(id=message.id, routers=self.named)]
            case ListModels():
                return [ModelList(id=message.id, models=(ModelInfo(name="m", max_model_len=9),))]
            case QueryHealth():
                return [HealthReport(id=message.id, live=True, ready=message.probe)]
            case QueryStatus():
                processes = (ProcessStatus(name="i0", kind="instance"),)
                return [StatusReport(id=message.id, processes=processes)]
            case TokenizeText():
                ids = tuple(ord(c) for c in message.text or "")
                return [TokenizedText(id=message.id, token_ids=ids)]
            case DetokenizeIds():
                text = "".join(map(chr, message.token_ids))
                return [DetokenizedText(id=message.id, text=text)]

    def _refuse(self, submit: SubmitRequest) -> RequestFailed:
        return RequestFailed(
            id=submit.id,
            code=self.refusal,
            message="as told",
            retry_after_ms=1000,
            everywhere=self.refuses_for_all,
        )

    def _answer(self, submit: SubmitRequest):
        prompt = submit.prompt
        if submit.messages is not None:
            prompt = submit.messages[-1].content
        if submit.embed:
            yield self._embed(submit)
            return
        if not isinstance(prompt, str):  # token ids, which are no script
            prompt = "echo a"
        verb, *words = prompt.split()
        if verb == "fail":
            yield RequestFailed(
                id=submit.id, code=words[0], message="as asked", param="p", retry_after_ms=2500
            )
        elif verb == "bad":
            yield BadMessage(message="as asked")
        elif verb == "half":
            yield self._delta(submit, 0, "x")
        elif verb == "gap":
            yield self._delta(submit, 0, "x")
            yield self._delta(submit, 2, "x")
        elif verb == "twice":
            yield self._delta(submit, 0, "x")
            yield self._delta(submit, 0, "x")
            yield self._end(submit, ["x"])
        elif verb in ("echo", "part"):
            held = len(submit.resume.outputs[0]) if submit.resume else 0
            count = len(words)
            if verb == "part":
                words = words[1:]
                count = len(words) if submit.resume else int(prompt.split()[1])
            if submit.stream:
                for index in range(held, count):
                    yield self._delta(submit, index, words[index])
            if count == len(words):
                yield self._end(submit, words)

    def _embed(self, submit: SubmitRequest) -> RequestFinished | RequestFailed:
        """Its length is its vector; a prompt of `fail CODE PARAM` fails."""
        prompt = submit.prompt
        assert prompt is not None
        if isinstance(prompt, str) and prompt.startswith("fail"):
            _, code, param = prompt.split()
            return RequestFailed(id=submit.id, code=code, message="as asked", param=param)
        vector = array("f", [len(prompt), submit.dimensions]).tobytes()
        usage = Usage(prompt_tokens=len(prompt), completion_tokens=0, cached_tokens=1)
        return RequestFinished(
            id=submit.id, request_id="r", choices=(), usage=usage, embedding=vector
        )

    def _delta(self, submit: SubmitRequest, index: int, word: str) -> TokenDelta:
        attempt = next_life(submit.resume.attempt) if submit.resume else 1
        return TokenDelta(
            id=submit.id, attempt=attempt, first_index=index, token_ids=(index,), text=word
        )

    def _end(self, submit: SubmitRequest, words: list[str]) -> RequestFinished:
        result = ChoiceResult(index=0, finish_reason="stop", stop_reason="!")
        if not submit.stream:
            result = ChoiceResult(
                index=0,
                finish_reason="stop",
                stop_reason="!",
                text="".join(words),
                token_ids=tuple(range(len(words))),
            )
        return RequestFinished(
            id=submit.id,
            request_id="r" * 32,
            choices=(result,),
            usage=Usage(prompt_tokens=1, completion_tokens=len(words)),
            seed=7,
        )


class RouterThread:
    """A FakeRouter on a loop of its own thread, for tests of the synchronous client."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def __enter__(self) -> FakeRouter:
        return self.router

    def __exit__(self, *exc) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        async def make() -> FakeRouter:
            return FakeRouter()

        self.router = self._loop.run_until_complete(make())
        self._ready.set()
        self._loop.run_forever()
        self.router.close()
        self._loop.close()
