"""What a request's state machine is tried against: a master's words, and what must come of them."""

from __future__ import annotations

import functools

from tests.router.model_dirs import byte_level_tokenizer
from xllm.protocol.instance import AdmitRequest, RequestEnded, TokenItem
from xllm.protocol.sampling import SamplingParams
from xllm.router.state.instructions import SendTo, Wish
from xllm.router.state.request import RequestLife
from xllm.router.state.spec import RequestSpec
from xllm.router.text.model import TextModel
from xllm.router.text.pieces import ByteLevelScheme

STOPS = [(), ("fox",), ("x j", "the l"), ("quick", "zz")]
"""Stop strings, for runs with and without them."""
TEXT = "the quick brown fox jumps over the lazy dog. " * 2


@functools.cache
def model() -> TextModel:
    return TextModel(byte_level_tokenizer(), ByteLevelScheme(), None)


@functools.cache
def stream(choice: int) -> tuple[int, ...]:
    """What the engine draws for a choice: a function of choice and index alone."""
    ids = model().encode(TEXT)
    return tuple(ids[choice:] + ids[:choice])


def make(stream_it: bool = True, hold_s: float = 0.02, stop_ids=(), **sampling) -> RequestLife:
    params = SamplingParams(**{"max_tokens": 20, "seed": 7, **sampling})
    spec = RequestSpec(
        request_id="r",
        client_id=5,
        model="m",
        prompt_ids=(1, 2, 3),
        sampling=params,
        deadline=100.0,
        stream=stream_it,
        hold_s=hold_s,
        stop_ids=frozenset(stop_ids),
    )
    return RequestLife(spec, [model().output(params, (1, 2, 3)) for _ in range(params.n)])


def start(state: RequestLife, instance: str = "a") -> AdmitRequest:
    word = state.place((("both", instance),), 0.0)[0]
    assert isinstance(word, SendTo)
    assert isinstance(word.message, AdmitRequest)
    return word.message


def item(first: int, count: int = 1, *, attempt: int = 1, choice: int = 0, **more) -> TokenItem:
    ids = stream(choice)[first : first + count]
    return TokenItem("r", choice, attempt, first, ids, **more)


class FakeMaster:
    """Runs attempts as a master would, its words in a queue for each connection."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.words: list = []
        self.done: dict[int, dict[int, int]] = {}
        """By attempt: where each choice that still runs is."""

    def hear(self, message) -> None:
        if isinstance(message, AdmitRequest):
            outputs = message.outputs or ((),) * message.sampling.n
            self.done[message.attempt] = {k: len(ids) for k, ids in enumerate(outputs)}
        elif message.choice >= 0:
            running = self.done.get(message.attempt)
            if running is not None and running.pop(message.choice, None) is not None:
                self.close(message.attempt)
        else:
            self.done.pop(message.attempt, None)

    def step(self, attempt: int, choice: int, count: int) -> None:
        running = self.done.get(attempt, {})
        if choice not in running:
            return
        first = running[choice]
        count = min(count, self.num_tokens - first)
        running[choice] = first + count
        is_last = running[choice] >= self.num_tokens
        reason = "length" if is_last else ""
        ids = stream(choice)[first : first + count]
        self.words.append(TokenItem("r", choice, attempt, first, ids, reason))
        if is_last:
            del running[choice]
            self.close(attempt)

    def close(self, attempt: int) -> None:
        if not self.done[attempt]:
            del self.done[attempt]
            self.words.append(RequestEnded("r", attempt, cached_tokens=2))


class ServedLife:
    """A request's life in a router, with a master that runs all its attempts. What it tells the
    client goes to `tell`: override it. `begun`: its first instructions."""

    def __init__(self, state: RequestLife, num_tokens: int, begun=(Wish.PLACE,)) -> None:
        self.state = state
        self.master = FakeMaster(num_tokens)
        self.wished = False
        self.carry_out(begun)

    def tell(self, message) -> None:
        raise NotImplementedError

    def carry_out(self, instructions) -> None:
        for one in instructions:
            if isinstance(one, SendTo):
                self.master.hear(one.message)
            elif one is Wish.PLACE:
                self.carry_out(self.state.place((("both", "a"),), 0.0))
            elif one is Wish.FLUSH:
                self.wished = True
            else:
                self.tell(one)
        self.state.check()

    def hear(self, word) -> None:
        """A word of the master's."""
        take = self.state.tokens if isinstance(word, TokenItem) else self.state.engine_ended
        self.carry_out(take(word))

    def step_all(self, draw) -> None:
        """Each choice that runs gets as many tokens as `draw()` says."""
        for attempt in sorted(self.master.done):
            for choice in list(self.master.done.get(attempt, ())):
                self.master.step(attempt, choice, draw())

    def flush(self) -> None:
        """What was wished for."""
        self.wished = False
        self.carry_out(self.state.flush())


def expected(choice: int, num_tokens: int, sampling: SamplingParams) -> tuple[list[int], str]:
    output = model().output(sampling, ())
    text = output.feed(stream(choice)[:num_tokens]) + output.finish()
    return list(stream(choice)[: output.num_tokens]), text
