"""Several inputs of one call for vectors: asked one by one, some at a time, answered together."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence

from xllm.client.requests import Prompt
from xllm.client.results import Embeddings
from xllm.errors import InvalidRequestError, RateLimitError, RequestError
from xllm.protocol.generation import RequestFinished, Usage
from xllm.protocol.wrong_value import renamed

Inputs = str | Sequence[int] | Sequence[str | Sequence[int]]
"""A text, token ids, or a list of either."""

WINDOW = 128
"""Inputs of one call that are open at a time."""


def split_inputs(inputs: Inputs) -> list[Prompt]:
    """The inputs one by one; InvalidRequestError where there are none, or one is empty."""
    if not isinstance(inputs, Sequence) or isinstance(inputs, bytes | bytearray):
        kind = type(inputs).__name__
        text = f"inputs must be a text, token ids or a list of either, not {kind}"
        raise InvalidRequestError(text, param="inputs")
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        return [inputs]  # type: ignore[list-item]  # the first says what the others are
    if not inputs:
        raise InvalidRequestError("inputs is empty", param="inputs")
    for index, one in enumerate(inputs):
        if isinstance(one, int) or not one:
            what = "is one token id among texts or lists" if isinstance(one, int) else "is empty"
            raise InvalidRequestError(f"inputs[{index}] {what}", param=f"inputs[{index}]")
    return list(inputs)  # type: ignore[arg-type]  # no single ids are among them


async def embed_all(
    prompts: Sequence[Prompt], ask: Callable[[Prompt], Awaitable[RequestFinished]]
) -> Embeddings:
    """Ask for the vector of each prompt; the first failure ends the others, and is raised."""
    gate = asyncio.Semaphore(WINDOW)

    async def one(index: int, prompt: Prompt) -> RequestFinished:
        async with gate:
            try:
                return await _asked(prompt, ask, alone=len(prompts) == 1)
            except RequestError as error:
                name = "inputs" if len(prompts) == 1 else f"inputs[{index}]"
                found = renamed(error.message, error.param, "prompt", name)
                if found is None:
                    raise
                raise type(error)(found[0], param=found[1]) from error

    tasks = [asyncio.ensure_future(one(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        results = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    usages = [result.usage for result in results]
    return Embeddings(
        tuple(array("f", result.embedding or b"") for result in results),
        Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=0,
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        ),
    )


async def _asked(
    prompt: Prompt, ask: Callable[[Prompt], Awaitable[RequestFinished]], *, alone: bool
) -> RequestFinished:
    """The vector of one prompt. One of several that is one too many for its tenant comes back when
    it is told to, until its time is over."""
    while True:
        try:
            return await ask(prompt)
        except RateLimitError as error:
            if alone:
                raise
            await asyncio.sleep(error.retry_after_s)
