"""The requests of the load: prompts, sampling and ways in, drawn from a seed. Pure."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from xllm.protocol.sampling import SamplingParams

NUM_PREFIXES = 4
PREFIX_LEN = 64
MAX_TAIL = 64
HTTP_SHARE = 0.25
"""Of the requests that go over HTTP; the others go over ZeroMQ."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. `over`: zmq or http; `hold_ms`: as in SubmitRequest."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    over: str
    hold_ms: int


def options_of(ask: Ask) -> dict[str, Any]:
    """Its sampling as options of the client library."""
    names = ("max_tokens", "temperature", "seed", "n", "ignore_eos")
    return {name: getattr(ask.sampling, name) for name in names}


class AskMaker:
    """An endless supply of requests of about `num_tokens` new tokens, greedy and sampled ones, one
    choice and several, a third of them with a prefix that others have, too."""

    def __init__(self, rng: random.Random, ids: range, num_tokens: int) -> None:
        self._rng = rng
        self._ids = ids
        self._num_tokens = num_tokens
        self._prefixes = [self._draw(PREFIX_LEN) for _ in range(NUM_PREFIXES)]

    def __iter__(self) -> Iterator[Ask]:
        return self

    def __next__(self) -> Ask:
        rng = self._rng
        prefix = rng.choice(self._prefixes) if rng.random() < 1 / 3 else ()
        over = "http" if rng.random() < HTTP_SHARE else "zmq"
        sampling = SamplingParams(
            max_tokens=max(2, int(self._num_tokens * rng.uniform(0.75, 1.25))),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            seed=rng.getrandbits(63),
            n=2 if over == "zmq" and rng.random() < 1 / 8 else 1,
            ignore_eos=True,
        )
        tail = self._draw(rng.randint(4, MAX_TAIL))
        return Ask((*prefix, *tail), sampling, over, rng.choice((0, 20)))

    def _draw(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.choice(self._ids) for _ in range(count))
