"""The terminal messages: how a request is told to be over."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.protocol.generation import RequestFailed, RequestFinished, Usage
from xllm.router.embedding import shorten
from xllm.router.state.choice import ChoiceState
from xllm.router.state.prompt_words import PromptWords
from xllm.router.state.spec import RequestSpec


def finished(
    spec: RequestSpec,
    choices: Sequence[ChoiceState],
    cached_tokens: int,
    words: PromptWords,
) -> RequestFinished:
    """The end as asked. Tokens count that were drawn, whoever drew them, the stop's included."""
    if words.vector is not None:
        return RequestFinished(
            id=spec.client_id,
            request_id=spec.request_id,
            choices=(),
            usage=Usage(len(spec.prompt_ids), 0, cached_tokens),
            embedding=shorten(words.vector, spec.dimensions),
        )
    results = []
    num_new = 0
    for choice in choices:
        results.append(choice.result(spec.stream))
        num_new += len(choice.ids)
    return RequestFinished(
        spec.client_id,
        spec.request_id,
        tuple(results),
        Usage(len(spec.prompt_ids), num_new, cached_tokens),
        spec.sampling.seed or 0,
        None if words.scores is None else tuple(words.scores),
    )


def failed(
    spec: RequestSpec,
    code: str,
    message: str,
    retry_after_ms: int,
    param: str | None,
) -> RequestFailed:
    """The end as a failure."""
    return RequestFailed(
        id=spec.client_id,
        code=code,
        message=message,
        request_id=spec.request_id,
        param=param,
        retry_after_ms=retry_after_ms,
    )
