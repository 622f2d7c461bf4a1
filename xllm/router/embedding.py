"""Requests for vectors: their bounds, and what is made of the vector that an instance gives.

Pure. A vector is bytes: float32, little-endian.
"""

from __future__ import annotations

import math
from array import array

from xllm.errors import InvalidRequestError
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.sampling import SamplingParams

_DEFAULTS = SamplingParams()
VECTOR_SAMPLING = SamplingParams(max_tokens=0, temperature=0.0, seed=0)
"""How an instance is asked for no token."""


def check_task(request: SubmitRequest, task: str, model: str) -> None:
    """Raise InvalidRequestError unless the model is served for what the request asks for."""
    if request.embed and task != "embed":
        raise InvalidRequestError(
            f"{model!r} is served for task {task}: it gives text, no vectors", param="model"
        )
    if task == "embed" and not request.embed:
        raise InvalidRequestError(
            f"{model!r} is served for task embed: it gives vectors (/v1/embeddings), no text",
            param="model",
        )


def check_embedding(request: SubmitRequest, size: int) -> None:
    """The fields that mean something else, or nothing, to a vector of `size` numbers."""
    if not request.embed:
        if request.dimensions:
            raise InvalidRequestError("dimensions needs embed", param="dimensions")
        return
    if request.prompt is None and not request.packed_prompt:
        raise InvalidRequestError("a vector is that of a prompt", param="messages")
    if request.sampling != _DEFAULTS:
        raise InvalidRequestError("nothing is sampled for a vector", param="sampling")
    if request.resume is not None:
        raise InvalidRequestError("a vector has no beginning to resume from", param="resume")
    if not 0 <= request.dimensions <= size:
        raise InvalidRequestError(
            f"dimensions must be from 1 to {size}, not {request.dimensions}", param="dimensions"
        )


def shorten(vector: bytes, dimensions: int) -> bytes:
    """The first `dimensions` numbers (0: all) of a vector, made to length one again."""
    numbers = array("f", vector)
    if not dimensions or dimensions >= len(numbers):
        return vector
    kept = numbers[:dimensions]
    length = math.sqrt(math.fsum(number * number for number in kept))
    if not length:
        return kept.tobytes()
    return array("f", [number / length for number in kept]).tobytes()
