"""What a request's bounds depend on, and how one that is out of them is refused."""

from __future__ import annotations

import dataclasses
import sys

from xllm.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What bounds depend on."""

    max_model_len: int
    vocab_size: int
    longest_token_bytes: int
    embedding_size: int = 0


ANY_MODEL = ModelFacts(sys.maxsize, sys.maxsize, 1)
"""For bounds that no model can widen, before one is known."""


def refuse(param: str, message: str) -> InvalidRequestError:
    """An error that names its field."""
    return InvalidRequestError(f"{param} {message}", param=param)
