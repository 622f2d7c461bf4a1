"""What an undisturbed run of a request gives.

With the toy engine that is known without a cluster: its streams are a function of the prompt, the
sampling parameters and the choice. Of a real model they are learnt from a run before any fault.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from xllm.cli.chaos.asks import Ask, options_of
from xllm.client.asynchronous import AsyncClient
from xllm.protocol.sampling import SamplingParams
from xllm.worker.toy.stream import predict
from xllm.worker.toy.vocabulary import toy_vocabulary

Streams = tuple[tuple[int, ...], ...]
"""The tokens of a request, by choice."""
LEARN_AT_ONCE = 8
LEARN_S = 300.0


def expected_streams(
    model_dir: str, prompt_ids: Sequence[int], sampling: SamplingParams, block_size: int = 16
) -> Streams:
    """The tokens of each choice of a request that the toy engine serves from that model directory,
    `sampling.max_tokens` long: stop ids and stop strings are not looked at."""
    ids = _drawn_ids(model_dir)
    count = sampling.max_tokens or 0
    return tuple(
        tuple(predict(prompt_ids, sampling, choice, count, ids, block_size=block_size))
        for choice in range(sampling.n)
    )


async def learn_streams(endpoint: str, asks: Sequence[Ask]) -> tuple[Streams, ...]:
    """The tokens of each choice of each request, as a service gives them that nobody disturbs."""
    limit = asyncio.Semaphore(LEARN_AT_ONCE)

    async def learn(ask: Ask) -> Streams:
        async with limit:
            answer = await client.generate(ask.prompt_ids, **options_of(ask))
        return tuple(choice.token_ids for choice in answer.choices)

    async with AsyncClient(endpoint, timeout_s=LEARN_S) as client:
        return tuple(await asyncio.gather(*map(learn, asks)))


@functools.lru_cache(maxsize=4)
def _drawn_ids(model_dir: str) -> range:
    return toy_vocabulary(model_dir)[1]
